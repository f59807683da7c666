"""``--mode=merge``, or export: fold the workdir's adapter into the weights, a folder that transformers loads."""

from pathlib import Path

from peft_jax.cli import console, trained_run, workdir
from peft_jax.cli.build_method import trained_on
from peft_jax.cli.checks import check_codes
from peft_jax.cli.load_model import load_model
from peft_jax.cli.session import Session, load_session
from peft_jax.cli.trained_run import Candidate
from peft_jax.core import tree
from peft_jax.core.files import expanded
from peft_jax.errors import PeftJaxError
from peft_jax.hub.save import save_pretrained
from peft_jax.hub.tokenizer import load_tokenizer
from peft_jax.methods.quantize import requantize
from peft_jax.parallel.mesh import make_mesh


def job(command) -> int:
    """Write the merged model to ``--output``, with ``--requantize`` in the base's codes again."""
    folder, config = trained_run.folder_of(command), command.config
    output = expanded(command.output) if command.output else folder / "merged"
    workdir.check_output(output, folder, config.model.source)
    if command.requantize:
        model, tokenizer, params = _merged_in_codes(command, folder)
    else:
        tokenizer, mesh = load_tokenizer(config.model.source), make_mesh(**config.mesh)
        model, base = load_model(config, trained_on(config), mesh)
        params = _mergeable(folder, trained_run.load(folder, config, model, base, mesh)).merged()
    if not command.output:
        workdir.claim(folder, "merged")
    save_pretrained(output, model, params, tokenizer)
    print(f"merged model: {output} ({console.size(workdir.bytes_in(output))})")
    return 0


def _merged_in_codes(command, folder: Path):
    """(model, tokenizer, parameters in the base's codes)."""
    config = command.config
    session = load_session(config, command.probe, trained_on(config))
    check_codes(session.base)
    candidate = _mergeable(folder, trained_run.load(folder, config, session.model, session.base, session.mesh))
    return session.model, session.tokenizer, _requantized(session, candidate.merged())


def _mergeable(folder: Path, candidate: Candidate) -> Candidate:
    if candidate.merge is None:
        raise PeftJaxError(f"{folder / 'adapter'} is of a method that cannot be folded into weights: use it as it is")
    return candidate


def _requantized(session: Session, merged: tree.Tree) -> tree.Tree:
    """``merged`` in the base's codes again; prints what that costs, leaf by leaf and in the metrics of the task."""
    again, errors = requantize(merged, session.base)
    print("relative error that quantising adds again:")
    for path, error in sorted(errors.items(), key=lambda item: -item[1]):
        print(f"  {error:.4f}  {path}")
    evaluate = session.evaluator(session.bound(), session.dequantize(again))
    print(console.metrics_table({"merged": evaluate(merged), "quantised": evaluate(again)}), flush=True)
    return again

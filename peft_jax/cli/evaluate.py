"""``--mode=eval``: the base model and what the workdir's run trained, side by side."""

from peft_jax.cli import console, trained_run, workdir
from peft_jax.cli.build_method import trained_on
from peft_jax.cli.session import load_session


def job(command) -> int:
    """Print the metrics of both, and write them to ``eval.json``."""
    folder, config = trained_run.folder_of(command), command.config
    session = load_session(config, command.probe, trained_on(config))
    candidate = trained_run.load(folder, config, session.model, session.base, session.mesh)
    dequantize = session.dequantize(candidate.params)
    metrics = {"base": session.evaluator(session.bound(), dequantize)(session.base),
               candidate.name: session.evaluator(candidate.apply, dequantize)(candidate.params)}
    print(console.metrics_table(metrics))
    workdir.write_report(folder, "eval.json", metrics)
    return 0

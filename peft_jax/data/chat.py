"""Questions and answers as turns of a chat, for models that were taught to chat."""

from collections.abc import Sequence
from typing import Any

from peft_jax.data.tables import named_columns
from peft_jax.data.turns import Example, chat_of
from peft_jax.errors import PeftJaxError
from peft_jax.hub.chat_template import render

ROLES = ("user", "assistant")  # of a question and its answer


def wants_chat(task) -> bool:
    """Whether the task asks for turns of a chat; only tasks with columns can."""
    return bool(getattr(task, "chat", False))


def as_turns(examples: Sequence[Example]) -> list[Example]:
    """Each prompt as a user's turn, each completion as the assistant's, without the spaces around them; chats stay.

    Before these go the text of ``"system"`` and the pairs of question and answer of ``"history"``, where there are any.

    Raises:
      PeftJaxError: an example that has neither prompt and completion nor messages, or whose history is something else.
    """
    return [_as_turns(example) for example in examples]


def _as_turns(example: Example) -> Example:
    if "messages" in example:
        return example
    if "completion" not in example:
        raise PeftJaxError(f"task.chat=True: {example.get('origin', 'an example')} has no prompt and completion to "
                           "make turns of; set --config.task.chat=False")
    taken = ("prompt", "completion", "history", "system")
    pairs = [*_pairs(example.get("history") or (), example.get("origin", "an example")),
             (example["prompt"], example["completion"])]
    turns = [{"role": role, "content": text.strip()} for pair in pairs for role, text in zip(ROLES, pair, strict=True)]
    return chat_of({"messages": turns, **{key: value for key, value in example.items() if key not in taken},
                    "system": example.get("system")}, example.get("origin", "an example"))


def _pairs(history: Any, where: str) -> list[Sequence[str]]:
    if not isinstance(history, Sequence) or any(
            isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair)
            for pair in history):
        raise PeftJaxError(f"{where}: history must be a list of pairs, a question and its answer each, found "
                           f"{str(history)[:40]!r}")
    return list(history)


def question(prompt: str, system: str = "") -> Example:
    """A question of a user, after a system prompt where there is one."""
    before = [{"role": "system", "content": system}] if system else []
    return {"messages": [*before, {"role": "user", "content": prompt}]}


def check_template(tokenizer, source: str, asked_by: str) -> None:
    """Raise ``PeftJaxError`` where the model ``source`` has no chat template, which ``asked_by`` needs."""
    if not tokenizer.chat_template:
        raise PeftJaxError(f"{asked_by} needs a chat template, and the tokenizer of {source} has none: leave it out, "
                           "or take a model that was taught to chat (often called Instruct)")


def unused_template(task, examples: Sequence[Example], tokenizer) -> str:
    """What to tell a person whose model has a chat template that plain questions and answers go without; "" where that
    is not so, as the prompts are written by it already, or where the task names its columns or has a template of its
    own, and so says what it wants."""
    if not tokenizer.chat_template or not hasattr(task, "chat") or wants_chat(task) or named_columns(task):
        return ""
    templates = (task.prompt_template, task.completion_template)
    if "completion" not in examples[0] or templates != ("{prompt}", "{completion}"):
        return ""
    mark = _end_of_question(tokenizer)
    if mark and mark in examples[0]["prompt"]:
        return ""
    return ("the model's chat template is not used: examples are learnt as plain text;\n"
            "--config.task.chat=True makes a user's and an assistant's turn of each")


def _end_of_question(tokenizer) -> str:
    """What the template writes behind a user's turn, its first line; "" where it cannot write one."""
    try:
        turn = render(tokenizer, question("QUESTION")["messages"], True, "a question")
    except PeftJaxError:
        return ""
    return turn.rpartition("QUESTION")[2].strip().partition("\n")[0]

"""Questions and answers as turns of a chat, for models that were taught to chat."""

from collections.abc import Sequence
from typing import Any

from peft_jax.data.tables import named_columns
from peft_jax.errors import PeftJaxError
from peft_jax.hub.chat_template import render

Example = dict[str, Any]  # as of sources.py


def wants_chat(task) -> bool:
    """Whether the task asks for turns of a chat; only tasks with columns can."""
    return bool(getattr(task, "chat", False))


def as_turns(examples: Sequence[Example]) -> list[Example]:
    """Each prompt as a user's turn, each completion as the assistant's, without the spaces around them; chats stay.

    Raises:
      PeftJaxError: an example that has neither prompt and completion nor messages.
    """
    return [_as_turns(example) for example in examples]


def _as_turns(example: Example) -> Example:
    if "messages" in example:
        return example
    if "completion" not in example:
        raise PeftJaxError(f"task.chat=True: {example.get('origin', 'an example')} has no prompt and completion to "
                           "make turns of; set --config.task.chat=False")
    others = {key: value for key, value in example.items() if key not in ("prompt", "completion")}
    turns = [{"role": "user", "content": example["prompt"].strip()},
             {"role": "assistant", "content": example["completion"].strip()}]
    return {"messages": turns, **others}


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

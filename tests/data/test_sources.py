import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.tasks import TASKS
from peft_jax.data import load_examples, sources, tables
from peft_jax.errors import PeftJaxError


def task(kind="file", **changes):
    return SimpleNamespace(**{**TASKS[kind], **changes})


def columns(path, **changes):
    return task(
        source=str(path),
        **{"prompt_column": "question", "completion_column": "answer", "validation_fraction": 0.0, **changes},
    )


ROWS = [{"question": f"What is {i}?", "answer": f" number {i}"} for i in range(40)]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def archive(folder, text, member="inner/ratings.txt"):
    path = folder / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in (member, "inner/other.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize(
    "mean, word",
    [
        (-2.01, "terrible"),
        (-2, "bad"),
        (-0.51, "bad"),
        (-0.5, "okay"),
        (0.5, "okay"),
        (0.51, "good"),
        (2, "good"),
        (2.01, "great"),
    ],
)
def test_words_at_the_edges(mean, word):
    movie = task("movie_rating")
    assert sources.rating_word(mean, movie.words, movie.bins) == word


def test_rated_sentences_become_examples_and_keep_the_human_mean(tmp_path):
    path = archive(tmp_path, "1\t2.5\tLilo &amp;amp; Stitch é\r\n2\t-0.6\tSlow")
    found = sources.read_rated_sentences(path, "inner/ratings.txt")
    assert found[0] == (2.5, "Lilo & Stitch é", "inner/ratings.txt:1")
    first, second = sources.rating_examples(task("movie_rating"), found)
    assert first["prompt"] == "Review: Lilo & Stitch é\nIn one word, the movie is"
    assert (first["completion"], first["score"], second["completion"]) == (" great", 2.5, " bad")


@pytest.mark.parametrize("line", ["2\tx\ttext", "2\t1.5", "2\tnan\ttext", "2\t1.0\t ", "2\t1\ta\tb"])
def test_bad_rated_line_is_named(tmp_path, line):
    with pytest.raises(PeftJaxError, match=r"inner/ratings.txt:2: expected"):
        sources.read_rated_sentences(archive(tmp_path, f"1\t1.0\tfine\r\n{line}"), "inner/ratings.txt")


def test_missing_member_names_the_nearest(tmp_path):
    with pytest.raises(PeftJaxError, match=r"did you mean inner/ratings.txt"):
        sources.read_rated_sentences(archive(tmp_path, ""), "inner/rating.txt")


def test_words_and_bins_must_agree():
    with pytest.raises(PeftJaxError, match="one word more"):
        sources.rating_examples(task("movie_rating", bins=(0.0,)), [])


def test_split_does_not_depend_on_the_prompt_template(tmp_path):
    found = [(0.0, f"text {i}", "") for i in range(300)]
    held = [
        {
            e["review"]
            for e in sources.split_by_hash(
                sources.rating_examples(task("movie_rating", prompt_template=t), found), 0.2
            )[1]
        }
        for t in ("Review: {text}", "{text}?")
    ]
    assert held[0] == held[1]


def test_jsonl_prompt_and_completion(jsonl):
    loaded = load_examples(columns(jsonl, prompt_template="Q: {prompt}\nA:"))
    assert [e["completion"] for e in loaded["train"]] == [row["answer"] for row in ROWS]
    assert loaded["train"][3]["prompt"] == "Q: What is 3?\nA:" and loaded["validation"] == []
    assert loaded["train"][3]["origin"].endswith("train.jsonl row 4")


def test_limits_and_validation_file(jsonl):
    loaded = load_examples(columns(jsonl, validation_source=str(jsonl), train_limit=7, validation_limit=5))
    assert (len(loaded["train"]), len(loaded["validation"])) == (7, 5)


def test_csv_keeps_text_as_it_is(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer,other\n"a, b",007,1\nNA,None,2\n')
    train = load_examples(columns(path))["train"]
    assert [(e["prompt"], e["completion"]) for e in train] == [("a, b", "007"), ("NA", "None")]


def test_parquet_messages_and_pattern(tmp_path):
    import datasets

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    for name in ("a", "b"):
        datasets.Dataset.from_list([{"turns": chat}]).to_parquet(tmp_path / f"{name}.parquet")
    train = load_examples(task(source=f"{tmp_path}/*.parquet", messages_column="turns", validation_fraction=0.0))[
        "train"
    ]
    assert [e["messages"] for e in train] == [chat, chat]


def test_json_array_of_texts(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"body": "one"}, {"body": "two"}]))
    train = load_examples(task(source=str(tmp_path / "a.json"), text_column="body", validation_fraction=0.0))["train"]
    assert [e["text"] for e in train] == ["one", "two"]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    "row, example",
    [
        ({"messages": CHAT, "id": 7}, {"messages": CHAT}),
        ({"prompt": "Q:", "completion": " A"}, {"prompt": "Q:", "completion": " A"}),
        ({"question": "Q?", "answer": "A"}, {"prompt": "Q?\n", "completion": "A"}),
        ({"instruction": "Do", "output": "done"}, {"prompt": "Do\n", "completion": "done"}),
        ({"instruction": "Do", "input": "it", "output": "done"}, {"prompt": "Do\n\nit\n", "completion": "done"}),
        ({"instruction": "Do", "input": "", "output": "done"}, {"prompt": "Do\n", "completion": "done"}),
        ({"instruction": "Do", "context": None, "response": "done"}, {"prompt": "Do\n", "completion": "done"}),
        ({"text": "Once."}, {"text": "Once."}),
    ],
)
def test_columns_whose_names_say_it_need_not_be_named(tmp_path, row, example):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    given = task(source=str(path), validation_fraction=0.0)
    assert load_examples(given)["train"] == [{**example, "origin": f"{path} row 1"}]
    assert sources.is_chat(given) == ("messages" in row)


def test_unnamed_columns_keep_a_given_template_and_the_text_of_a_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n01,007\n")
    loaded = load_examples(task(source=str(path), prompt_template="Q: {prompt}\nA: ", validation_fraction=0.0))
    assert (loaded["train"][0]["prompt"], loaded["train"][0]["completion"]) == ("Q: 01\nA: ", "007")


@pytest.mark.parametrize("row", [{"body": "a", "label": "b"}, {"text": "a", "question": "b", "answer": "c"},
                                 {"instruction": "a", "output": "b", "response": "c"}])  # fmt: skip
def test_columns_that_do_not_say_it_are_listed_with_the_keys_to_set(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(PeftJaxError, match=rf"a.jsonl: .* columns {', '.join(row)}; name .*--config.task.text_column"):
        load_examples(task(source=str(path), validation_fraction=0.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "fil"}, "did you mean file"),
        ({"completion_column": "anwser"}, "no column 'anwser'; did you mean answer"),
        ({"completion_column": ""}, "name the columns.*given: prompt"),
        ({"text_column": "question"}, "name the columns"),
        ({"source": "{}/trian.jsonl"}, "no data file at .*trian.jsonl'; did you mean train.jsonl"),
        ({"source": ""}, "task.source is empty"),
        ({"validation_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_configuration_errors(jsonl, change, message):
    change = {k: v.format(jsonl.parent) if k == "source" else v for k, v in change.items()}
    with pytest.raises(PeftJaxError, match=message):
        load_examples(SimpleNamespace(**{**vars(columns(jsonl)), **change}))


@pytest.mark.parametrize("fraction, train, held, note", [
    (1e-9, 39, 1, "1e-09 of 40 examples is none: 1 is held out (task.validation_fraction)"),
    (1 - 1e-9, 1, 39, "0.999999999 of 40 examples is all: 1 is trained on (task.validation_fraction)"),
])
def test_a_fraction_leaves_one_example_on_each_side(jsonl, fraction, train, held, note):
    data = sources.load_data_set(columns(jsonl, validation_fraction=fraction))
    assert (len(data.train), len(data.validation), data.notes) == (train, held, (note,))
    hashes = [[sources.hash_fraction(sources.text_key(e)) for e in side] for side in (data.train, data.validation)]
    assert max(hashes[1]) < min(hashes[0])  # the one nearest to the edge


def test_two_examples_are_one_of_each_and_a_split_that_works_stays(jsonl):
    for fraction in (0.01, 0.5, 0.99):
        pair = [{"text": "one"}, {"text": "two"}, {"text": " ONE "}]
        train, held = sources.split_by_hash(pair, fraction)
        keys = [{sources.text_key(e) for e in side} for side in (train, held)]
        assert sorted(map(len, keys)) == [1, 1] and not keys[0] & keys[1]
    data = sources.load_data_set(columns(jsonl, validation_fraction=0.3))
    held = [e for e in data.train + data.validation if sources.hash_fraction(sources.text_key(e)) < 0.3]
    assert data.validation == held and data.notes == ()


@pytest.mark.parametrize("fraction, message", [(1e-9, "leaves none for validation"),
                                               (1 - 1e-9, "leaves none for training")])
def test_one_text_cannot_be_split(tmp_path, fraction, message):
    (tmp_path / "a.csv").write_text("text\nsame\nSame\n")
    with pytest.raises(PeftJaxError, match=message):
        load_examples(task(source=str(tmp_path / "a.csv"), validation_fraction=fraction))


def test_columns_without_use_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("id,question,answer,source\n1,q,a,web\n2,r,b,web\n")
    assert sources.load_data_set(task(source=str(tmp_path / "a.csv"))).unused == ("id", "source")
    assert sources.load_data_set(task("python_reference")).unused == ()


@pytest.mark.parametrize("bad", ['{"question": "a", "answer"', "[1]", '{"question": "\udcff"}'])
def test_bad_json_line_is_named(jsonl, bad):
    with jsonl.open("ab") as file:
        file.write(bad.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(PeftJaxError, match=r"train.jsonl, line 41: not"):
        load_examples(columns(jsonl))


def test_row_without_a_value_is_named(jsonl):
    with jsonl.open("a") as file:
        file.write('{"question": "what?"}\n')
    with pytest.raises(PeftJaxError, match=r"train.jsonl row 41: column 'answer' must hold text, found nothing"):
        load_examples(columns(jsonl))


def test_ragged_csv_and_unknown_ending(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,b\na,b,c\n")
    with pytest.raises(PeftJaxError, match=r"a.csv: .*line 3"):
        load_examples(columns(tmp_path / "a.csv"))
    (tmp_path / "a.jsnl").write_text("")
    with pytest.raises(PeftJaxError, match=r"'.jsnl' is not a known file ending; did you mean .jsonl"):
        load_examples(columns(tmp_path / "a.jsnl"))


@pytest.mark.parametrize("name, content", [("a.jsonl", ""), ("a.csv", "question,answer\n"), ("a.json", "[]")])
def test_empty_data_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(PeftJaxError, match=r"empty|no data"):
        load_examples(columns(tmp_path / name))


def test_unreachable_hub_says_what_to_do(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PeftJaxError, match=r"cannot load the data set 'nobody/nothing'.*local file"):
        tables.read_hub("nobody/nothing", "", "train")


def test_bad_messages_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"turns": [{"role": "user"}]}\n')
    with pytest.raises(PeftJaxError, match="row 1: messages must be a list"):
        load_examples(task(source=str(path), messages_column="turns"))


@pytest.mark.real
def test_the_default_task_and_the_newspaper_probe():
    from peft_jax.hub import download

    movie = task("movie_rating")
    path = Path(download.fetch(movie.source, movie.archive))
    words = [e["word"] for e in sources.rating_examples(movie, sources.read_rated_sentences(path, movie.file))]
    assert [words.count(word) for word in movie.words] == [1904, 3157, 562, 2946, 2036]
    loaded, probe = load_examples(movie), load_examples(task("newspaper"))
    assert (len(loaded["train"]), len(loaded["validation"])) == (9579, 1026)
    assert (len(probe["train"]), len(probe["validation"])) == (0, 5190)
    assert not {sources.text_key(e) for e in loaded["train"]} & {sources.text_key(e) for e in loaded["validation"]}

"""Named tasks: where the examples come from, how a prompt is written, how validation is held out.

Every key that a task of that kind may have is here with its default. Strings: "" means "not set"; limits: 0 means
"all". Kinds (see ``peft_jax/data/sources.py``): ``rating`` rated sentences, answered in one word or by a head,
``sentences`` plain text, ``reference`` Python's own documentation, ``file`` local .jsonl, .json, .csv or .parquet,
``hub`` a data set of the Hugging Face Hub. ``--config=FILE:task=PATH`` is of kind file, ``task=owner/name`` of kind
hub.
"""

# Hutto and Gilbert, "VADER", ICWSM 2014: sentences with the mean of about 20 human ratings from -4 to 4. The wheel has
# no data, the source distribution has. ``archive`` is a file of the distribution, ``file`` a member of that archive.
VADER_SOURCE = "pypi:vaderSentiment==3.3.2"
VADER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"

# Give either prompt_column and completion_column, or messages_column, or text_column; or none, where the columns' names
# say it: messages or conversations (with system, tools); prompt, completion; question, answer; instruction, output or
# response (with input or context); text. Beside prompts and instructions, too: system, history and tools, of chats.
# The completion follows the prompt directly: write the space or line break between them into a template.
COLUMNS = {
    "prompt_column": "",
    "completion_column": "",
    "messages_column": "",
    "text_column": "",
    "prompt_template": "{prompt}",
    "completion_template": "{completion}",
    # Of messages: how their keys and roles are called where they are not role and content, or from and value, and
    # system, user, assistant, tool, or human and gpt. A pair is NAME=ROLE, such as ("critic=assistant",).
    "role_key": "",
    "content_key": "",
    "roles": (),
    "chat": False,  # prompt and completion as a user's and an assistant's turn, in the model's chat template
    # For a head to tell: text_column and label_column, or none where they are called text and label. With an encoder
    # the answer need not be set: it is "score" where labels are numbers that are not all whole, else "class".
    "answer": "word",
    "label_column": "",
    "num_labels": 2,  # class, of whole numbers from 0 in a column that is named here; else as many as there are
    "label_names": (),  # class, by number: () takes words that are labels, in sorted order
    "pooling": "first",
    "validation_fraction": 0.05,
    "train_limit": 0,
    "validation_limit": 0,
}

MOVIES = {
    "kind": "rating",
    "source": VADER_SOURCE,
    "archive": VADER_ARCHIVE,
    "file": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "prompt_template": "Review: {text}\nIn one word, the movie is",
    "completion_template": " {word}",
    "words": ("terrible", "bad", "okay", "good", "great"),
    # Edges between the words on the human mean. A mean that equals an edge gets the word nearer to zero.
    "bins": (-2.0, -0.5, 0.5, 2.0),
    # What each word is worth when the expected rating is computed: the middle of its bin.
    "word_values": (-3.0, -1.25, 0.0, 1.25, 3.0),
    "validation_fraction": 0.1,
    "train_limit": 0,
    "validation_limit": 0,
    "answer": "word",  # written, "word"; told by a head: which word it is, "class", or the rating as a number, "score"
    "pooling": "first",  # a head reads the first token's state, or the "mean" over the text
}

TASKS = {
    "movie_rating": {"name": "movie_rating", **MOVIES},
    "movie_classes": {"name": "movie_classes", **MOVIES, "answer": "class"},
    "movie_score": {"name": "movie_score", **MOVIES, "answer": "score"},
    # Its neighbours: the same question of other sentences, with their own human ratings (same authors, same archive).
    "amazon_rating": {"name": "amazon_rating", **MOVIES,
                      "file": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
                      "prompt_template": "Review: {text}\nIn one word, the product is"},
    "tweet_rating": {"name": "tweet_rating", **MOVIES, "file": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
                     "prompt_template": "Tweet: {text}\nIn one word, the mood is"},
    # General text, held out as a whole: what does fine-tuning on something else do to it?
    "newspaper": {
        "name": "newspaper",
        "kind": "sentences",
        "answer": "word",
        "source": VADER_SOURCE,
        "archive": VADER_ARCHIVE,
        "file": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
        "validation_fraction": 1.0,
        "train_limit": 0,
        "validation_limit": 0,
    },
    # The same of another kind: paragraphs of the Python language reference, as help() has it (each version its own).
    "python_reference": {"name": "python_reference", "kind": "reference", "answer": "word",
                         "source": "pydoc_data.topics", "validation_fraction": 1.0, "train_limit": 0,
                         "validation_limit": 0},
    "file": {
        "name": "file",
        "kind": "file",
        "source": "",  # a path, or a pattern such as data/*.jsonl
        "validation_source": "",  # its own file; "" holds out validation_fraction of source by a hash of the text
        **COLUMNS,
    },
    "hub": {
        "name": "hub",
        "kind": "hub",
        "source": "",  # a Hub id such as openai/gsm8k
        "subset": "",  # the data set's configuration, such as main
        "train_split": "train",
        "validation_split": "",  # "" holds out validation_fraction of train_split by a hash of the text
        **COLUMNS,
    },
}

"""What is used of transformers, imported without its advice to install torch: tokenizers need none.

transformers gives the advice once, when it is imported, and the variable below is its own way not to. It stays unset
for whoever imports transformers later, and advice given already is nobody's loss.
"""

import os

_VARIABLE = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
_before = os.environ.get(_VARIABLE)
os.environ[_VARIABLE] = "1"
try:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
finally:
    if _before is None:
        del os.environ[_VARIABLE]
    else:
        os.environ[_VARIABLE] = _before

__all__ = ["AutoTokenizer", "PreTrainedTokenizerFast"]

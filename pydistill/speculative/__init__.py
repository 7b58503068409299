"""Speculative decoding of Hugging Face causal models, on `pydistill.verify`.

`decoding` is the public function and its loop; `cached_model` a model with a key-value cache that
is rolled back, on the layers of `growing_cache`; `drafts` where proposed tokens come from;
`draft_length` how many are worth proposing; `settings` what of a generation configuration is
honoured; `results` what is returned. `certification` asks if the law is the target's: `exact_law`
by enumeration, `sample_tests` by samples. transformers is imported when models are given, never
before.
"""

from pydistill.speculative.certification import Certificate as Certificate
from pydistill.speculative.certification import certify as certify
from pydistill.speculative.decoding import generate as generate
from pydistill.speculative.drafts import Ngram as Ngram
from pydistill.speculative.drafts import truncated as truncated
from pydistill.speculative.results import GenerateResult as GenerateResult
from pydistill.speculative.results import GenerateStats as GenerateStats

__all__ = [
    "Certificate", "GenerateResult", "GenerateStats", "Ngram", "certify", "generate", "truncated",
]  # fmt: skip

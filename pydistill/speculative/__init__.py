"""Speculative decoding of Hugging Face causal models, on `pydistill.verify`.

`decoding` is the public function and its loop; `cached_model` a model with a key-value cache that
is rolled back, on the layers of `growing_cache`; `drafts` where proposed tokens come from;
`draft_models` and `feature_draft` what is made of a target to draft for it; `draft_length` how many
tokens are worth proposing; `settings` what of a generation configuration is honoured; `results`
what is returned. `certification` asks if the law is the target's: `exact_law` by enumeration,
`sample_tests` by samples. transformers is imported when models are given, never before.
"""

from pydistill.speculative.certification import Certificate as Certificate
from pydistill.speculative.certification import certify as certify
from pydistill.speculative.decoding import generate as generate
from pydistill.speculative.draft_models import frequent_tokens as frequent_tokens
from pydistill.speculative.draft_models import load_draft as load_draft
from pydistill.speculative.draft_models import reduced as reduced
from pydistill.speculative.draft_models import truncated as truncated
from pydistill.speculative.drafts import Ngram as Ngram
from pydistill.speculative.feature_draft import FeatureDraft as FeatureDraft
from pydistill.speculative.feature_draft import feature as feature
from pydistill.speculative.results import GenerateResult as GenerateResult
from pydistill.speculative.results import GenerateStats as GenerateStats

__all__ = [
    "Certificate", "FeatureDraft", "GenerateResult", "GenerateStats", "Ngram", "certify", "feature",
    "frequent_tokens", "generate", "load_draft", "reduced", "truncated",
]  # fmt: skip

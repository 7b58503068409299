"""Compiled operators for distillation and distilled inference."""

from importlib.metadata import PackageNotFoundError, version

from pydistill import _native as _native
from pydistill.ops._conventions import CONVENTIONS as CONVENTIONS
from pydistill.ops._topk_conventions import TOPK_CONVENTIONS as TOPK_CONVENTIONS
from pydistill.ops._topk_teacher import TopkTeacher as TopkTeacher
from pydistill.ops.cache_decode import cache_decode as cache_decode
from pydistill.ops.causal_conv1d import causal_conv1d as causal_conv1d
from pydistill.ops.divergence import DivergenceStats as DivergenceStats
from pydistill.ops.divergence import divergence as divergence
from pydistill.ops.divergence import divergence_jvp as divergence_jvp
from pydistill.ops.divergence import divergence_with_stats as divergence_with_stats
from pydistill.ops.linear_divergence import linear_divergence as linear_divergence
from pydistill.ops.linear_token_logprob import linear_token_logprob as linear_token_logprob
from pydistill.ops.linear_topk_divergence import linear_topk_divergence as linear_topk_divergence
from pydistill.ops.token_logprob import TokenLogprob as TokenLogprob
from pydistill.ops.token_logprob import token_logprob as token_logprob
from pydistill.ops.token_logprob import token_logprob_jvp as token_logprob_jvp
from pydistill.ops.topk_divergence import topk_divergence as topk_divergence
from pydistill.ops.topk_divergence import topk_divergence_jvp as topk_divergence_jvp
from pydistill.ops.topk_logprobs import TopkLogprobs as TopkLogprobs
from pydistill.ops.topk_logprobs import topk_logprobs as topk_logprobs
from pydistill.ops.verify import VerifyGradient as VerifyGradient
from pydistill.ops.verify import VerifyResult as VerifyResult
from pydistill.ops.verify import verify as verify
from pydistill.ops.verify import verify_with_gradient as verify_with_gradient
from pydistill.reference.divergence import KINDS as KINDS
from pydistill.speculative import Certificate as Certificate
from pydistill.speculative import GenerateResult as GenerateResult
from pydistill.speculative import certify as certify
from pydistill.speculative import generate as generate

try:
    __version__ = version("pydistill-kernels")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0+unknown"

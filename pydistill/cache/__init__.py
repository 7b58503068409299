"""Teacher caches: top-k log-probabilities written once and read for many students.

docs/cache.md tells how to make and use one, and what its files hold.
"""

from pydistill.cache.manifest import CacheError as CacheError
from pydistill.cache.manifest import Manifest as Manifest
from pydistill.cache.manifest import tokenizer_hash as tokenizer_hash
from pydistill.cache.report import Truncation as Truncation
from pydistill.cache.report import truncation as truncation
from pydistill.cache.teacher_cache import TeacherCache as TeacherCache
from pydistill.cache.writer import CacheWriter as CacheWriter

"""The ladder's own tests, and how tests of Triton kernels get the right process.

Triton decides at import whether it interprets or compiles (TRITON_INTERPRET). A test that runs a
kernel in the strict interpreter carries the mark

    @pytest.mark.interpreter          # or pytestmark = pytest.mark.interpreter for a file

and `tools.ladder.isolation`, switched on below, runs all marked tests of a session in one child
process with TRITON_INTERPRET=1 and reports them here, each under its own name. A plain `pytest`
thus runs everything. To debug one, run it directly: `TRITON_INTERPRET=1 pytest path::test`.

Compile tests (`tools.ladder.dry_run`) need no mark. Another folder's conftest needs the same two
lines of `pytest_configure`; a second installation in one session is ignored. Marked and unmarked
tests may share a file, but kernels must not be launched while the file is imported.
"""

import pytest

from tools.ladder import isolation


def pytest_configure(config: pytest.Config) -> None:
    isolation.install(config)

"""The tables of cases that prove an operator, and the one checker that runs them.

    from pydistill.testing import check, load

    for case in load("divergence"):
        report = check(case, impl="auto", device="cpu")
        assert report.ok, report.message

Tests, `pydistill selftest`, the benchmarks and the GPU ladder read the same tables.
"""

from pydistill.testing.case import Case as Case
from pydistill.testing.case import Expected as Expected
from pydistill.testing.case import Report as Report
from pydistill.testing.case import Tolerance as Tolerance
from pydistill.testing.case import check as check
from pydistill.testing.case import expected as expected
from pydistill.testing.cases import load as load
from pydistill.testing.cases import names as names

"""Random calls of every public op against float64; `make fuzz` runs more of them, from other seeds."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import losses, ops, refusals
from tests.fuzz.draws import Case, cases
from tests.fuzz.exact import COUNTS

pytestmark = pytest.mark.slow_interpreted if "RLAD_FUZZ_CASES" not in os.environ else []
CASES = os.environ.get("RLAD_FUZZ_CASES")  # in all; without it the same few each time
SHARES = {
    "logp": 28,
    "divergence": 16,
    "methods": 14,
    "topk": 12,
    "options": 10,
    "gather": 10,
    "filtered": 5,
    "refused": 5,
}  # in 100
ANY = cases()


def fuzz(op: str, drawn: st.SearchStrategy[Case] = ANY) -> Callable[..., Any]:
    share = int(CASES or 500) * SHARES[op] // 100
    limits = settings(
        max_examples=share, derandomize=CASES is None, database=None, deadline=None,
        print_blob=CASES is not None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        done, failed = 0, False

        @functools.wraps(test)
        def told(*args: Any, **kwargs: Any) -> None:
            """A failure is said before it is made smaller, which can take five minutes."""
            nonlocal done, failed
            done += 1
            if sys.stderr.isatty() and done <= share and not failed:
                print(f"\r{op:>12} case {done:,} of {share:,} ", end="\r" if done == share else "", file=sys.stderr, flush=True)
            try:
                test(*args, **kwargs)
            except Exception:
                if CASES is not None and not failed:
                    print(f"\n{op}: case {done} fails: {args}, {kwargs}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                failed = True
                raise

        return limits(given(st.data(), drawn)(told))

    return decorate


@pytest.fixture(autouse=True)
def _report() -> Iterator[None]:
    before = COUNTS.copy()
    yield
    print("\n" + "\n".join(f"{op:>12} {what:<24} {n:>7,}" for (op, what), n in sorted((COUNTS - before).items())), flush=True)


@fuzz("logp")
def test_linear_logp(data: st.DataObject, case: Case) -> None:
    ops.logp(data.draw, case)
    COUNTS["logp", "agrees"] += 1


@fuzz("filtered")
def test_filter_eps(data: st.DataObject, case: Case) -> None:
    ops.filtered(data.draw, case)
    COUNTS["filter_eps", "agrees"] += 1


@fuzz("topk")
def test_linear_topk(data: st.DataObject, case: Case) -> None:
    ops.topk(data.draw, case)
    COUNTS["topk", "agrees"] += 1


@fuzz("gather")
def test_linear_gather(data: st.DataObject, case: Case) -> None:
    ops.gather(data.draw, case)
    COUNTS["gather", "agrees"] += 1


@fuzz("divergence")
def test_divergences(data: st.DataObject, case: Case) -> None:
    teachers = [data.draw(cases(like=case)) for _ in range(data.draw(st.sampled_from((1, 1, 2))))]
    ops.divergence(data.draw, case, teachers)
    COUNTS["divergence", "agrees"] += 1


@fuzz("methods", cases(shapes=((4, 7), (4, 7), (4, 7), (2, 3), (1, 1), (3, 0))))
def test_methods(data: st.DataObject, case: Case) -> None:
    COUNTS["linear_loss", losses.method(data.draw, case)] += 1


@fuzz("options")
def test_loss_options(data: st.DataObject, case: Case) -> None:
    COUNTS["linear_loss", losses.options(data.draw, case)] += 1


@fuzz("refused", cases(shapes=((1,), (4,), (2, 3))))
def test_bad_arguments_are_named(data: st.DataObject, case: Case) -> None:
    COUNTS["refused", refusals.refused(data.draw, case)] += 1

"""The refusal codes."""

from __future__ import annotations

import re

import pytest

from creditlane.codes import SENTENCES, Code

QUARANTINE = {
    "malformed",
    "unknown_operation",
    "unknown_version",
    "invalid_message",
    "out_of_range",
    "internal_error",
}


@pytest.mark.parametrize("code", list(Code))
def test_each_code_has_a_sentence_that_ends_with_a_full_stop(code: Code) -> None:
    assert code.sentence == SENTENCES[code]
    assert re.fullmatch(r"[A-Z][^\n]*[^.\s]\.", code.sentence)


def test_no_two_codes_have_the_same_sentence() -> None:
    assert len(set(SENTENCES.values())) == len(SENTENCES) == len(Code)


@pytest.mark.parametrize("code", list(Code))
def test_each_code_is_the_lower_case_of_its_name(code: Code) -> None:
    assert str(code) == code.value == code.name.lower()


def test_the_codes_of_quarantine_stand_before_those_of_refusals() -> None:
    order = [str(code) for code in Code]
    assert set(order[: len(QUARANTINE)]) == QUARANTINE


def test_the_refusals_that_the_ledger_documents_exist() -> None:
    documented = {
        "insufficient_credits",
        "unknown_account",
        "account_closed",
        "unknown_feature",
        "unknown_hold",
        "hold_closed",
        "exceeds_original",
        "id_conflict",
        "invalid",
    }
    assert documented <= {str(code) for code in Code}

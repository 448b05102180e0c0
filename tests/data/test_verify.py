import pytest

from data.example import Example
from data.instructions import instructions
from data.verify import final_box, final_number, is_correct
from data.word_problems import word_problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 12", "12"),
        ("3 + 4 = 7\n#### 7\n", "7"),
        ("#### 1\nno, #### 2", "2"),
        ("#### 1,200.50", "1200.5"),
        ("#### $-30.", "-30"),
        ("####5.00", "5"),
        ("it is 12", None),
        ("#### twelve", None),
        ("", None),
    ],
)
def test_final_number(text, expected):
    assert final_number(text) == expected


def test_final_box_balances_braces():
    assert final_box(r"so \boxed{1} or rather \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert final_box(r"\boxed{1") is None
    assert final_box("1") is None


def reasoning(answer: str) -> Example:
    return Example(
        "reasoning", [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], "x"
    )


def test_is_correct_compares_final_results():
    assert is_correct(reasoning("#### 1,000"), "so\n#### 1000.0") is True
    assert is_correct(reasoning("#### 10"), "#### 11") is False
    assert is_correct(reasoning("#### 10"), "10") is False
    assert is_correct(reasoning(r"\boxed{ 2x }"), r"\boxed{2x}") is True
    assert is_correct(reasoning("ten"), "ten") is None


def test_every_reference_answer_is_correct_and_an_empty_one_is_not():
    for one in [*word_problems(per_template=3), *instructions(per_template=3)]:
        assert is_correct(one, one.answer()) is True
        assert is_correct(one, "") is False


def test_free_text_cannot_be_checked():
    assert is_correct(Example("chat", [{"role": "assistant", "content": "hm"}], "chitchat"), "hm") is None

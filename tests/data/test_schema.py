import pytest

from data.example import Example
from data.schema import to_example
from training.config import UserError


def convert(row, **settings) -> Example:
    return to_example(row, dataset="mine", where="mine.jsonl:7", **settings)


def turns(*contents: str) -> list[dict]:
    return [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant") * 2, contents, strict=False)
    ]


@pytest.mark.parametrize(
    ("row", "family", "prompt_format"),
    [
        ({"messages": turns("Q", "A")}, "chat", "chat_template"),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "chat",
            "chat_template",
        ),
        ({"instruction": "Q", "input": "", "output": "A", "text": "Q A"}, "chat", "chat_template"),
        ({"instruction": "Q", "context": "", "response": "A", "category": "x"}, "chat", "chat_template"),
        ({"prompt": "Q", "answer": "A"}, "chat", "chat_template"),
        ({"prompt": "Q", "completion": "A"}, "chat", "chat_template"),
        ({"question": "Q", "answer": "A"}, "reasoning", "problem"),
        ({"problem": "Q", "solution": "A", "level": "Level 1"}, "reasoning", "problem"),
        ({"func_documentation_string": "Q", "func_code_string": "A"}, "code", "task"),
        ({"docstring": "Q", "code": "A"}, "code", "task"),
    ],
)
def test_known_schemas(row, family, prompt_format):
    assert convert(row) == Example(family, turns("Q", "A"), "mine", prompt_format=prompt_format)


def test_text():
    one = convert({"text": "Once"})
    assert (one.family, one.prompt_format) == ("text", "text")
    assert one.messages == [{"role": "assistant", "content": "Once"}]


def test_alpaca_input_follows_the_instruction():
    assert convert({"instruction": "Sum up", "input": "1 2", "output": "3"}).messages == turns(
        "Sum up\n\n1 2", "3"
    )


def test_field_map_format_and_family():
    row = {"frage": "Q", "antwort": "A", "pruefung": "assert f()", "text": "unused"}
    fields = {"prompt": "frage", "answer": "antwort", "tests": "pruefung"}
    one = convert(row, fields=fields, family="code", prompt_format="instruction")
    assert one == Example("code", turns("Q", "A"), "mine", tests="assert f()", prompt_format="instruction")


def test_system_and_template_columns_pass_through():
    one = convert({"prompt": "Q", "answer": "A", "system": "Be kind", "template": "t1"})
    assert one.messages[0] == {"role": "system", "content": "Be kind"} and one.template == "t1"


def test_an_example_passes_through_unchanged():
    one = Example("code", turns("Q", "A"), "other")
    assert convert(one) is one


def test_a_missing_answer_is_an_empty_one():
    assert convert({"question": "Q", "answer": None}).answer() == ""


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"a": 1, "b": 2}, {}, "columns a, b fit no known schema"),
        ({}, {}, "columns (none) fit no known schema"),
        (["a"], {}, "must be an object with named fields, not list"),
        ("text", {}, "must be an object with named fields, not str"),
        ({"question": "Q", "answer": 4}, {}, "4 is not text"),
        ({"messages": "hello"}, {}, "messages not as expected"),
        ({"messages": [{"role": "robot", "content": "x"}]}, {}, "role 'robot' is none of user"),
        ({"messages": [{"content": "x"}]}, {}, "messages not as expected: 'role'"),
        ({"messages": None}, {}, "messages not as expected"),
        ({"q": "Q"}, {"fields": {"prompt": "q", "answer": "a"}}, "no column 'a'; the row has q"),
    ],
)
def test_wrong_rows_are_one_line_with_their_place(row, settings, expected):
    with pytest.raises(UserError) as caught:
        convert(row, **settings)
    assert str(caught.value).startswith("mine.jsonl:7: ") and expected in str(caught.value)
    assert "\n" not in str(caught.value)

import pytest

from data.example import Example
from data.prompts import FORMATS, IGNORED, encode, encode_all, prompt_text

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Hello 12345!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]


def example(messages=CHAT, prompt_format="chat_template", family="chat") -> Example:
    return Example(family, list(messages), "test", prompt_format=prompt_format)


def targets(tokenizer, labels) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_chat_targets_are_what_the_template_marks_as_generated(tokenizer):
    input_ids, labels = encode(example(), tokenizer)
    marked = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    # The template ends a conversation with a newline that is nobody's answer.
    assert input_ids == marked["input_ids"][:-1]
    assert [int(label != IGNORED) for label in labels] == marked["assistant_masks"][:-1]
    assert targets(tokenizer, labels) == "Hello 12345!<|im_end|>See you<|im_end|>"


@pytest.mark.parametrize("prompt_format", FORMATS[:4])
def test_a_document_is_the_prompt_that_generation_uses_and_the_answer(tokenizer, prompt_format):
    one = example(prompt_format=prompt_format)
    input_ids, labels = encode(one, tokenizer)
    prompt = tokenizer(prompt_text(CHAT[:-1], prompt_format, tokenizer), add_special_tokens=False)[
        "input_ids"
    ]
    answer = tokenizer("See you", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert tokenizer.decode(input_ids) == tokenizer.decode(prompt + answer)
    assert input_ids[-len(answer) :] == answer == labels[-len(answer) :]
    assert all(label in (IGNORED, token) for token, label in zip(input_ids, labels, strict=True))


@pytest.mark.parametrize(
    ("prompt_format", "expected"),
    [
        ("instruction", "### Instruction:\nAdd 1\n\n### Response:\n"),
        ("task", "Task:\nAdd 1\n\nSolution:\n"),
        ("problem", "Problem:\nAdd 1\n\nSolution:\n"),
        ("chat_template", "<|im_start|>user\nAdd 1<|im_end|>\n<|im_start|>assistant\n"),
        ("text", "Add 1"),
    ],
)
def test_prompt_formats(tokenizer, prompt_format, expected):
    assert prompt_text([{"role": "user", "content": "Add 1"}], prompt_format, tokenizer) == expected


def test_train_on_prompt_makes_all_but_the_first_token_a_target(tokenizer):
    input_ids, labels = encode(example(), tokenizer, train_on_prompt=True)
    assert labels[0] == IGNORED
    assert labels[1:] == input_ids[1:]


def test_max_length_cuts_both(tokenizer):
    whole_ids, whole_labels = encode(example(), tokenizer)
    assert encode(example(), tokenizer, max_length=7) == (whole_ids[:7], whole_labels[:7])


def test_a_plain_text_is_all_target_but_its_first_token(tokenizer):
    input_ids, labels = encode(
        example([{"role": "assistant", "content": " A tale.\n"}], "text", "text"), tokenizer
    )
    assert tokenizer.decode(input_ids) == " A tale.\n<|im_end|>"
    assert labels == [IGNORED, *input_ids[1:]]


def test_no_answer_no_target(tokenizer):
    for messages in (CHAT[:2], [CHAT[1], {"role": "assistant", "content": " \n"}]):
        _, labels = encode(example(messages), tokenizer)
        assert not any(label != IGNORED for label in labels)


def test_encoding_together_equals_encoding_alone(tokenizer):
    several = [example(), example(CHAT[:2]), example(CHAT[1:3], "task", "code")]
    assert encode_all(several, tokenizer) == [encode(one, tokenizer) for one in several]


def test_a_tokenizer_without_chat_template_uses_the_instruction_format(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert encode(example(), bare) == encode(example(prompt_format="instruction"), tokenizer)


def test_a_template_that_rewrites_history_trains_the_last_answer(tokenizer):
    import copy

    # As templates of reasoning models do: earlier answers are shown without their thoughts.
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content if loop.last or m.role == 'user' else 'x' }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    input_ids, labels = encode(example(CHAT[1:]), forgetful)
    assert targets(tokenizer, labels) == "See you<|im_end|>"
    assert "Hello" not in tokenizer.decode(input_ids)

"""A preference row, a prompt and two answers to it -> the prompt with each of them."""

from chunkflow.data.messages import checked_messages, show

ANSWERS = ("chosen", "rejected")
QUESTIONS = ("prompt", "instruction", "question", "problem")
PAIR_RULE = 'preference training (recipes/dpo.py) reads {"prompt", "chosen", "rejected"}'


def has_answers(row: dict) -> bool:
    return all(row.get(answer) is not None for answer in ANSWERS)


def with_each_answer(row: dict, notes: set[str]) -> list[tuple[tuple[str, str], dict]]:
    """The chosen, then the rejected answer: what the row calls prompt and answer, and a row of these two.

    Answers are strings, lists of messages that follow the prompt, or whole chats, whose longest common
    beginning is the prompt then. ValueError, one sentence, for another row.
    """
    if missing := [answer for answer in ANSWERS if answer not in row]:
        raise ValueError(
            f'the row has no "{missing[0]}" (it has {show(list(row))}): {PAIR_RULE}, name its keys in'
            " training.columns, or train on it with recipes/finetune.py"
        )
    if "weight" in row:
        raise ValueError(
            f"weight is {show(row['weight'])}, and each preference pair counts the same: remove it"
        )
    question = next((key for key in QUESTIONS if row.get(key) not in ("", [])), "prompt")
    whole = [_is_whole_chat(row[answer], row.get(question)) for answer in ANSWERS]
    if any(whole):
        row = _split_chats(row, question, whole, notes)
    elif question not in row:
        raise ValueError(
            f'the row has no "prompt" and chosen is {show(row["chosen"])}: write a prompt, or whole chats,'
            " lists of messages that begin alike, as chosen and rejected"
        )
    others = {key: value for key, value in row.items() if key not in ANSWERS}
    return [((question, answer), others | {answer: row[answer]}) for answer in ANSWERS]


def _is_whole_chat(answer, prompt) -> bool:
    """Whether the answer is a list of messages that has the prompt in it."""
    if not isinstance(answer, list) or not answer or not isinstance(answer[0], dict):
        return False
    if isinstance(prompt, list):
        return answer[: len(prompt)] == prompt
    return answer[0].get("role", answer[0].get("from")) not in ("assistant", "gpt", "model", "bot")


def _split_chats(row: dict, question: str, whole: list[bool], notes: set[str]) -> dict:
    """The row with what both chats begin with as the prompt, and what is left of them as the answers."""
    if not all(whole):
        is_whole, other = ANSWERS if whole[0] else ANSWERS[::-1]
        raise ValueError(
            f"{is_whole} is a whole chat and {other} is {show(row[other])}: write both as whole chats, or"
            " both as what follows the prompt"
        )
    chats = [checked_messages(row[answer], answer, notes)[0] for answer in ANSWERS]
    most = min(map(len, chats)) - 1  # equal chats differ in their last message, too
    common = next((n for n, pair in enumerate(zip(*chats)) if pair[0] != pair[1]), most)
    common = min(common, most)
    if common == 0:
        raise ValueError(
            "chosen and rejected have no message in common at their beginning: two answers have the same"
            " prompt, correct the row or remove it"
        )
    prompt = row.get(question)
    said = [message.get("content") for message in chats[0][:common]]
    if isinstance(prompt, str) and prompt not in said:
        raise ValueError(
            f"{question} is {show(prompt)}, and no message of the beginning that chosen and rejected share:"
            " remove it, or correct the chats"
        )
    return row | {question: row["chosen"][:common]} | {answer: row[answer][common:] for answer in ANSWERS}

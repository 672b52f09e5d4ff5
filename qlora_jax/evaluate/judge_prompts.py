"""What a judge is asked: the meaning of the paper's judge prompts (§5.2, appendix), in our words.

Two forms. `"scores"`: both answers are marked from 1 to 10, against a reference system (Table 6).
`"choice"`: the better one is named, or neither (Elo, Tables 1 and 7); the reasons come first, so
that the verdict follows from them. Questions of the categories `coding` and `math` are judged by
what matters there; all others alike.

The formats of the verdicts are what `parse_scores` and `parse_choice` read.
"""

from typing import Literal

Form = Literal["scores", "choice"]

SYSTEM = "You compare two answers to the same question, carefully and without favour."

_LAYOUT = """\
Question:
{question}

=== Assistant 1 ===
{first}
=== end of Assistant 1 ===

=== Assistant 2 ===
{second}
=== end of Assistant 2 ===

{task}"""

_CRITERIA = {
    "general": (
        "Judge how helpful, relevant, accurate and detailed each of the two answers above is."
    ),
    "coding": (
        "Two assistants were asked for a program. Judge whether each program does what was asked, "
        "how correct and efficient it is, how well it is structured and explained by comments, and "
        "whether it keeps to good style."
    ),
    "math": (
        "Two assistants were asked a mathematical question. First solve it yourself, without "
        "relying on their answers. Then check each solution step by step and say which steps are "
        "wrong; the way counts, not the result alone."
    ),
}

_FAIRNESS = "Which answer stands first must not matter to you, nor how long an answer is by itself."

_VERDICTS = {
    "scores": (
        "Mark each assistant from 1 (useless) to 10 (excellent). Write the two marks alone on the "
        "first line, Assistant 1's first, separated by a space. Give your reasons below."
    ),
    "scores-math": (
        "Mark each assistant from 1 (useless) to 10 (excellent). End with a line that holds the "
        "two marks alone, Assistant 1's first, in the form (a, b)."
    ),
    "choice": (
        "Give your reasons first. Then end with a line that holds one digit alone: 1 if Assistant "
        "1's answer is better, 2 if Assistant 2's is, 3 if they are equally good."
    ),
}


def judge_messages(
    form: Form, question: str, first: str, second: str, category: str = "general"
) -> list[dict[str, str]]:
    """The chat that asks a judge about two answers, in the order given.

    Raises:
        ValueError: an unknown form.
    """
    if form not in ("scores", "choice"):
        raise ValueError(f"form is {form!r}, but 'scores' or 'choice' is needed.")
    kind = category if category in _CRITERIA else "general"
    verdict = _VERDICTS.get(f"{form}-{kind}", _VERDICTS[form])
    task = f"{_CRITERIA[kind]} {_FAIRNESS}\n\n{verdict}"
    content = _LAYOUT.format(question=question, first=first, second=second, task=task)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]

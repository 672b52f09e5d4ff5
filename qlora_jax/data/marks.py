"""Marks around pieces of a text that a template writes, to find them again in the result."""

# Noncharacters: Unicode keeps them for a program's own use and no text may hold them.
GENERATION, CONTENT = ("\ufdd0", "\ufdd1"), ("\ufdd2", "\ufdd3")
MARKS = (*GENERATION, *CONTENT)
_OPENING = {closing: opening for opening, closing in (GENERATION, CONTENT)}
_CUT_APART = (
    "a chat template cuts apart what it has written between {% generation %} and "
    "{% endgeneration %}: it has to come out whole."
)

Span = tuple[int, int]


def read_marks(text: str) -> tuple[str, dict[str, list[Span]]]:
    """The text without marks, and by opening mark where the marked pieces stand in it.

    Raises:
        ValueError: a mark has no partner, for the template cuts marked text apart.
    """
    spans: dict[str, list[Span]] = {GENERATION[0]: [], CONTENT[0]: []}
    if not any(mark in text for mark in MARKS):
        return text, spans
    kept: list[str] = []
    opened: dict[str, int] = {}
    for character in text:
        if character not in MARKS:
            kept.append(character)
            continue
        begins = character in spans
        opening = character if begins else _OPENING[character]
        if begins == (opening in opened):
            raise ValueError(_CUT_APART)
        if begins:
            opened[opening] = len(kept)
        else:
            spans[opening].append((opened.pop(opening), len(kept)))
    if opened:
        raise ValueError(_CUT_APART)
    return "".join(kept), spans

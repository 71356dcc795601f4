"""What an option may be, and how a rule, a signal, a consensus or a codec declares one of its own."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """What an option may be.

    Attributes:
        test: says of a value whether it is allowed; may raise.
        rule: the same in words.
        hint: what to try, in words or as a function of the value.
        choices: the names it may have, for an option that is one of a table's keys.
    """

    test: Callable[[Any], bool]
    rule: str | Callable[[], str]
    hint: str | Callable[[Any], str]
    choices: Collection[Any] | None = None

    @property
    def grows(self) -> bool:
        """Whether it is one of a table's keys, to which others may be added."""
        return isinstance(self.choices, Mapping)

    @property
    def flag(self) -> bool:
        """Whether it is on or off, and nothing between; True is no number."""
        return all(map(self.test, (True, False))) and not self.test(0.5)

    @property
    def words(self) -> str:
        """The rule in words, as things are now: tables may have grown."""
        return self.rule if isinstance(self.rule, str) else self.rule()


@dataclass(frozen=True)
class Option:
    """An option that something declares for itself, in its `options` by name.

    Attributes:
        default: what it is if nobody says.
        allowed: what it may be.
    """

    default: Any
    allowed: Allowed


Options = Mapping[str, Option]


def check_options(options: Mapping[str, Any], allowed: Mapping[str, Allowed], where: str = "") -> None:
    """Raise ValueError (TypeError for a wrong type) at the first option that breaks its rule."""
    for name, may_be in allowed.items():
        if name not in options:
            continue
        value = options[name]
        try:
            fine = bool(may_be.test(value)) and (not isinstance(value, bool) or may_be.flag)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(_breaks(name, may_be, value, where)) from error
        if not fine:
            raise ValueError(_breaks(name, may_be, value, where))


def _breaks(name: str, may_be: Allowed, value: Any, where: str) -> str:
    hint = may_be.hint if isinstance(may_be.hint, str) else may_be.hint(value)
    return f"{name} must be {may_be.words}; got {value!r}{where}; {hint}"


def nearest(value: Any, choices: Iterable[Any], otherwise: Any) -> Any:
    """Return the choice that was meant by something that is none: the one of the same word and the nearest
    number, as outer-4 for outer-3, or the one that is spelled nearly so; otherwise that one."""
    by_text = {str(choice): choice for choice in choices}
    word, number = _word_and_number(str(value))
    alike = {text: n for text in by_text for w, n in [_word_and_number(text)] if w == word and n >= 0}
    if number >= 0 and alike:
        return by_text[min(alike, key=lambda text: abs(alike[text] - number))]
    close = difflib.get_close_matches(str(value).casefold(), by_text, n=1, cutoff=0.55)
    return by_text[close[0]] if close else otherwise


def _word_and_number(text: str) -> tuple[str, int]:
    """Return a text without the number at its end, and that; -1 where there is none."""
    found = re.fullmatch(r"(.*?)(\d+)", text)
    return (found[1], int(found[2])) if found else (text, -1)

"""Match module paths against the patterns of `rank_pattern` and `alpha_pattern` without a backtracking engine.

PEFT matches `(.*\\.)?(pattern)$` with Python's `re`; an adapter's author can hang that. Here a pattern that is a plain
name is looked up in a dict, and any other is compiled to a small automaton (Thompson, 1968) whose time is linear in
the path, with a budget over all matches. Begin with PathPatterns.
"""

from collections.abc import Callable, Iterable

from moelora.integrations.adapter_types import AdapterError, shown

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda char: not char.isdecimal(),
    "w": lambda char: char.isalnum() or char == "_",
    "W": lambda char: not (char.isalnum() or char == "_"),
}
_MAX_LENGTH = 256
_MAX_NESTING = 16
_MAX_AUTOMATA = 64
# a few seconds of Python; the patterns of a large model with a handful of expressions need a tenth of it
STEP_BUDGET = 10_000_000


class PathPatterns:
    """An ordered set of patterns; `first_match(path)` is the pattern that PEFT would choose, or None.

    A dot in a plain name stands for a dot here, while in PEFT's regular expression it stands for any character.

    Raises:
        AdapterError: on construction, for a pattern that is too long or uses a construct outside the subset
            (literals, `.`, `\\d`, `\\w`, `[...]`, groups, `|`, `*`, `+`, `?`, `^`, `$`).
    """

    def __init__(self, patterns: Iterable[str], *, budget: int = STEP_BUDGET) -> None:
        self._plain: dict[str, int] = {}
        self._automata: list[tuple[int, _Automaton]] = []
        self._patterns: list[str] = list(patterns)
        self._steps = 0
        self._budget = budget
        for index, pattern in enumerate(self._patterns):
            name = pattern.replace("\\.", ".")
            if name and _PLAIN.issuperset(name):
                self._plain.setdefault(name, index)
            else:
                self._automata.append((index, _Automaton(pattern)))
        if len(self._automata) > _MAX_AUTOMATA:
            raise AdapterError(
                f"{len(self._automata)} patterns are regular expressions; expected at most {_MAX_AUTOMATA}. "
                "Write plain module paths instead"
            )

    def first_match(self, path: str) -> str | None:
        """The first pattern, in their order, that matches the path or a tail of it that begins after a dot."""
        if not self._patterns:
            return None
        best = len(self._patterns)

        # plain names: look up every tail
        tail = path
        while True:
            best = min(best, self._plain.get(tail, best))
            _, dot, tail = tail.partition(".")
            if not dot:
                break

        # automata, in order, as long as they could still win
        for index, automaton in self._automata:
            if index > best:
                break
            matched, steps = automaton.match(path)
            self._steps += steps
            if self._steps > self._budget:
                raise AdapterError("the regular expressions of this config take too long; write plain module paths")
            if matched:
                best = index
                break
        return self._patterns[best] if best < len(self._patterns) else None


class _Automaton:
    """A pattern as a graph: a state either consumes one character by a test, or has free edges, or asserts a place."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _MAX_LENGTH:
            raise AdapterError(f"pattern {shown(pattern)} has {len(pattern)} characters; expected <= {_MAX_LENGTH}")
        self._source = pattern
        self._position = 0
        self._tests: list[Callable[[str], bool] | str | None] = []
        self._edges: list[list[int]] = []
        start, ends = self._alternatives(0)
        if self._position < len(pattern):
            self._refuse("unbalanced )")
        self._start = start
        self._end = self._state(None)
        self._link(ends, self._end)

    def match(self, path: str) -> tuple[bool, int]:
        """Whether some tail of the path (from the start or after a dot) matches as a whole, and the steps it took."""
        current: set[int] = set()
        steps = 0
        for place in range(len(path) + 1):
            # a match may begin at the start and after every dot
            if place == 0 or path[place - 1] == ".":
                steps += self._enter(self._start, place, len(path), current)
            steps += len(current) + 1
            if place == len(path):
                break
            following: set[int] = set()
            for state in current:
                test = self._tests[state]
                if callable(test) and test(path[place]):
                    for target in self._edges[state]:
                        steps += self._enter(target, place + 1, len(path), following)
            current = following
        return self._end in current, steps

    def _enter(self, state: int, place: int, length: int, into: set[int]) -> int:
        """Put a state, and all that its free edges reach, into a set; the number of edges that were looked at."""
        waiting = [state]
        steps = 0
        while waiting:
            state = waiting.pop()
            steps += 1
            test = self._tests[state]
            blocked = (test == "^" and place != 0) or (test == "$" and place != length)
            if state in into or blocked:
                continue
            into.add(state)
            if not callable(test):
                waiting.extend(self._edges[state])
        return steps

    def _state(self, test: Callable[[str], bool] | str | None) -> int:
        self._tests.append(test)
        self._edges.append([])
        return len(self._tests) - 1

    def _link(self, states: list[int], target: int) -> None:
        for state in states:
            self._edges[state].append(target)

    def _refuse(self, what: str) -> None:
        raise AdapterError(
            f"pattern {shown(self._source)} is not supported ({what} at character {self._position}); "
            "write plain module paths, which is what PEFT saves"
        )

    def _peek(self) -> str:
        return self._source[self._position] if self._position < len(self._source) else ""

    def _take(self) -> str:
        char = self._peek()
        if not char:
            self._refuse("unexpected end")
        self._position += 1
        return char

    def _alternatives(self, depth: int) -> tuple[int, list[int]]:
        if depth > _MAX_NESTING:
            self._refuse("deep nesting")
        start = self._state(None)
        ends: list[int] = []
        while True:
            first, last = self._sequence(depth)
            self._edges[start].append(first)
            ends.extend(last)
            if self._peek() != "|":
                return start, ends
            self._take()

    def _sequence(self, depth: int) -> tuple[int, list[int]]:
        start = self._state(None)
        ends = [start]
        while self._peek() not in ("", "|", ")"):
            first, last = self._repeated(depth)
            self._link(ends, first)
            ends = last
        return start, ends

    def _repeated(self, depth: int) -> tuple[int, list[int]]:
        first, last = self._atom(depth)
        quantifier = self._peek()
        if quantifier not in ("*", "+", "?"):
            return first, last
        self._take()
        if self._peek() == "?":  # lazy: for a match of the whole path the same
            self._take()
        if self._peek() in ("*", "+", "?"):
            self._refuse("repeated quantifier")
        entry, leave = self._state(None), self._state(None)
        self._edges[entry].append(first)
        self._link(last, leave)
        if quantifier != "+":
            self._edges[entry].append(leave)
        if quantifier != "?":
            self._edges[leave].append(entry)
        # the end is a state of its own, so that the loop's edge is not taken for the way out
        out = self._state(None)
        self._edges[leave].append(out)
        return entry, [out]

    def _atom(self, depth: int) -> tuple[int, list[int]]:
        char = self._take()
        if char == "(":
            if self._peek() == "?":
                self._take()
                if self._take() != ":":
                    self._refuse("look-around or named group")
            first, last = self._alternatives(depth + 1)
            if self._take() != ")":
                self._refuse("missing )")
            return first, last
        if char in "*+?{}":
            self._refuse(f"quantifier {char}")
        if char in "^$":
            state = self._state(char)
        elif char == ".":
            state = self._state(lambda _: True)
        elif char == "[":
            state = self._state(self._character_class())
        elif char == "\\":
            state = self._state(self._escape())
        else:
            state = self._state(char.__eq__)
        return state, [state]

    def _escape(self) -> Callable[[str], bool]:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum():
            self._refuse(f"escape \\{char}")
        return char.__eq__

    def _character_class(self) -> Callable[[str], bool]:
        negated = self._peek() == "^"
        if negated:
            self._take()
        members: list[Callable[[str], bool]] = []
        while (char := self._take()) != "]" or not members:
            if char == "\\":
                members.append(self._escape())
            elif self._peek() == "-" and self._source[self._position + 1 : self._position + 2] not in ("", "]"):
                self._take()
                members.append(_between(char, self._take()))
            else:
                members.append(char.__eq__)
        return lambda char: any(member(char) for member in members) != negated


def _between(low: str, high: str) -> Callable[[str], bool]:
    return lambda char: low <= char <= high

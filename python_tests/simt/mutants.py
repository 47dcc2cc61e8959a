"""Finds the places in csrc/cuda where one thing can be wrong, and weaves all those mistakes into one source.

Every mutant is an edit that a run-time number switches on, so that one build holds them all:

    __syncthreads();      ->  (SHIVA_MUTANT(1) ? (void)0 : __syncthreads());
    if (i < n && ok)      ->  if (SHIVA_MUTANT(2) || (i < SHIVA_BOUND(3) > n && (SHIVA_MUTANT(4) || (ok))))
    x[i]                  ->  x[(i) + SHIVA_MUTANT(5)]
    T* p = x + row;       ->  T* p = x + row + SHIVA_MUTANT(5);
    i < n ? x : 0         ->  (SHIVA_MUTANT(6) || (i < SHIVA_BOUND(7) > n)) ? x : 0

A bound's edit turns < into <= and so on. clang-format puts spaces around a comparison and none inside template
brackets, which tells the two uses of < apart. Edits never change the number of lines.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER = """// Switches of the mutants woven into the kernels.
#pragma once
extern "C" {
extern __attribute__((visibility("default"))) int shiva_mutant;
extern __attribute__((visibility("default"))) unsigned char* shiva_mutants_reached;
}
namespace shiva::mutation {
__attribute__((noinline, no_sanitize("thread", "address"))) static bool is_on(int number) {
  shiva_mutants_reached[number] = 1;
  return shiva_mutant == number;
}
constexpr bool on(int number) { return __builtin_is_constant_evaluated() ? false : is_on(number); }
enum class Kind { Less, LessEqual, Greater, GreaterEqual };
struct Bound {
  Kind kind;
  int number;
};
template <typename X>
struct Left {
  X x;
  Bound bound;
};
template <typename X>
constexpr Left<X> operator<(X x, Bound bound) {
  return {x, bound};
}
template <typename X, typename Y>
constexpr bool operator>(Left<X> left, Y y) {
  const bool other = on(left.bound.number);
  switch (left.bound.kind) {
    case Kind::Less: return other ? left.x <= y : left.x < y;
    case Kind::LessEqual: return other ? left.x < y : left.x <= y;
    case Kind::Greater: return other ? left.x >= y : left.x > y;
    default: return other ? left.x > y : left.x >= y;
  }
}
}  // namespace shiva::mutation
#define SHIVA_MUTANT(number) ::shiva::mutation::on(number)
#define SHIVA_BOUND(kind, number) (::shiva::mutation::Bound{::shiva::mutation::Kind::kind, number})
"""
STORAGE = """#include "mutation.h"
static unsigned char reached[{count}];
int shiva_mutant = -1;
unsigned char* shiva_mutants_reached = reached;
"""
KINDS = {" < ": "Less", " <= ": "LessEqual", " > ": "Greater", " >= ": "GreaterEqual"}
OPPOSITE = {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > "}
CALL = re.compile(r"\b(?:__syncthreads|__syncwarp|wait_\w+|commit_\w+)(?:<[^;<>]*>)?\([^;()]*\)(?=;)")
SKIP = re.compile(
    r"^\s*(?:#|template|__global__|using|namespace|struct|enum|static_assert|(?:static )?constexpr|asm|SHIVA_SHARED"
    r"|SHIVA_DYNAMIC)"
)
DECLARED_ARRAY = re.compile(
    r"^\s*(?!return |else )(?:const |static )*[\w:]+(?:<[^;=]*>)?[ &*]+\w+(?:\[[^\]]*\])+(?: = .*)?[;,]"
)
POINTER = re.compile(r"[\w>]\* (?:__restrict__ )?(\w+)\b")  # a declaration; a product has a space before its star
DECLARED_PARAMETER = re.compile(r"\(&\w+\)(?:\[[^\]]*\])+$")  # T (&sums)[kSide]
BEFORE_CONDITION = re.compile(r"(?:[^=!<>]= |return |, |: |\? |<< )$")  # also +=, but not ==
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Mutant:
    """One possible mistake.

    Attributes:
        edits: (column, characters taken out, text put in); ``{n}`` in the text stands for the mutant's number.
    """

    file: str
    line: int
    rule: str
    code: str
    change: str
    occurrence: int
    edits: tuple[tuple[int, int, str], ...]

    @property
    def id(self) -> str:
        """Stable while the line's own text is: does not depend on its number."""
        what = f"{self.file}\0{self.rule}\0{self.code}\0{self.change}\0{self.occurrence}"
        return f"{self.file}:{self.rule}:{hashlib.sha256(what.encode()).hexdigest()[:10]}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}  [{self.rule}: {self.change}]"


def _closing(code: str, start: int, stops: tuple[str, ...]) -> int:
    """Where the expression that begins at start ends: before an unmatched bracket, or one of stops outside brackets."""
    depth = 0
    for at in range(start, len(code)):
        if depth == 0 and (code[at] in CLOSING or code.startswith(stops, at)):
            return at
        depth += (code[at] in OPENING) - (code[at] in CLOSING)
    return len(code)


def _beginning(code: str, end: int) -> int:
    """Where the condition that ends at end begins."""
    depth = 0
    for at in range(end - 1, -1, -1):
        if depth == 0:
            if code[at] in OPENING:
                return at + 1
            if BEFORE_CONDITION.search(code, 0, at + 1):
                return at + 1
        depth += (code[at] in CLOSING) - (code[at] in OPENING)
    return len(code) - len(code.lstrip())


def _is_minimum(code: str, comparison: re.Match) -> bool:
    """Whether it is that of `a < b ? a : b`, where a and b may be exchanged when they are equal."""
    choice = re.search(r" \? ", code[comparison.end() :])
    if choice is None:
        return False
    left = code[_beginning(code, comparison.start()) : comparison.start()]
    right, rest = code[comparison.end() :][: choice.start()], code[comparison.end() + choice.end() :]
    parts = rest[: _closing(rest, 0, (";", ", "))].split(" : ")
    plain = [re.sub(r"^static_cast<\w+>\((.*)\)$", r"\1", part) for part in parts]
    return sorted(plain) == sorted([left, right])


def _always(start: int, end: int) -> tuple[tuple[int, int, str], ...]:
    return (start, 0, "(SHIVA_MUTANT({n}) || ("), (end, 0, "))")


def _places(code: str, pointers: set[str]) -> Iterator[tuple[str, str, tuple[tuple[int, int, str], ...]]]:
    """(rule, change, edits) of one line."""
    for match in CALL.finditer(code):
        edits = (match.start(), 0, "(SHIVA_MUTANT({n}) ? (void)0 : "), (match.end(), 0, ")")
        yield "barrier" if "sync" in match[0].split("(")[0][:7] else "wait", f"no {match[0]}", edits
    for match in re.finditer(r" [<>]=? ", code):
        token = match[0]
        if _is_minimum(code, match):
            continue
        edits = ((match.start(), len(token), f" < SHIVA_BOUND({KINDS[token]}, {{n}}) > "),)
        yield "bound", f"{token.strip()} to {OPPOSITE[token].strip()} at {match.start()}", edits
    for match in re.finditer(r"\bif \(", code):
        end = _closing(code, match.end(), (";",))
        if end < len(code) and code[end] == ")":
            yield "guard", f"no {code[match.end() : end]}", _always(match.end(), end)
    for match in re.finditer(r" && ", code):
        end = _closing(code, match.end(), (" && ", " || ", " ? ", ";", ", "))
        if code.endswith((" &&", " ||"), 0, end):  # the condition goes on in the next line
            end -= 3
        yield "guard", f"no {code[match.end() : end]}", _always(match.end(), end)
    for match in re.finditer(r" \? ", code):
        start = _beginning(code, match.start())
        if code.startswith("sizeof(", start):  # chosen by the compiler
            continue
        yield "guard", f"always {code[start : match.start()]}", _always(start, match.start())
    if not DECLARED_ARRAY.search(code):
        for match in re.finditer(r"(?<=[\w\]])\[", code):
            end = _closing(code, match.end(), ())
            if match.end() < end < len(code) and not DECLARED_PARAMETER.search(code[: match.start()]):
                inside = code[match.end() : end]
                edits = (match.end(), 0, "("), (end, 0, ") + SHIVA_MUTANT({n})")
                yield "index", f"[{inside}] + 1 at {match.start()}", edits
    for match in re.finditer(r"(?<![\w.>])(?:\w+\.)?(\w+) \+=? ", code):
        if match[1] in pointers:
            end = _closing(code, match.end(), (";", ", ", " ? ", " : "))
            yield "index", f"{code[match.start() : end]} + 1 at {match.start()}", ((end, 0, " + SHIVA_MUTANT({n})"),)
    for match in re.finditer(r"\bat<\w+>\([^;]*", code):
        start = match.start() + match[0].index("(") + 1
        end = _closing(code, start, ())
        if end < len(code):
            yield "index", f"at({code[start:end]} + 1) at {start}", ((end, 0, " + SHIVA_MUTANT({n})"),)


def mutants_of(file: Path) -> list[Mutant]:
    """All mutants of a source, except of code that the simulator's build leaves out."""
    found, seen, simulated, in_macro = [], {}, [True], False
    lines = file.read_text().splitlines()
    pointers = {name for text in lines for name in POINTER.findall(text.split("//")[0])}
    for number, text in enumerate(lines, 1):
        continues, in_macro = in_macro, text.endswith("\\")
        directive = text.strip()
        if directive.startswith("#if"):
            simulated.append(not directive.startswith("#if !defined(SHIVA_SIMT)"))
            known = "SHIVA_SIMT" in directive
            simulated[-1] = simulated[-1] if known else True
        elif directive.startswith("#else"):
            simulated[-1] = not simulated[-1]
        elif directive.startswith("#endif"):
            simulated.pop()
        # Strings keep their length, so that columns stay right.
        code = re.sub(r'"[^"]*"', lambda m: '"' + "." * (len(m[0]) - 2) + '"', text).split("//")[0].rstrip()
        if continues or not code or SKIP.search(code) or "if constexpr" in code or not all(simulated):
            continue
        for rule, change, edits in _places(code, pointers):
            # The same line may stand in several kernels: they are told apart by how often it came before.
            key = code.strip(), rule, change
            seen[key] = seen.get(key, 0) + 1
            found.append(Mutant(file.name, number, rule, code.strip(), change, seen[key], edits))
    return found


def weave(text: str, numbered: list[tuple[int, Mutant]]) -> str:
    """The source with every mutant in it, each under its number."""
    lines = text.splitlines()
    by_line: dict[int, list[tuple[int, int, int, str]]] = {}
    for number, mutant in numbered:
        width = mutant.edits[-1][0] - mutant.edits[0][0]
        for part, (column, length, new) in enumerate(mutant.edits):
            # Of insertions at one column: closings come first, the inner one ahead; then openings, the outer one ahead.
            opens = part == 0 and len(mutant.edits) > 1
            order = (column, opens, -width if opens else width)
            by_line.setdefault(mutant.line, []).append((order, column, length, new.replace("{n}", str(number))))
    for line, edits in by_line.items():
        old, new, at = lines[line - 1], [], 0
        for _, column, length, inserted in sorted(edits, key=lambda edit: edit[0]):
            new += [old[at:column], inserted]
            at = column + length
        lines[line - 1] = "".join([*new, old[at:]])
    return "\n".join(lines) + "\n"

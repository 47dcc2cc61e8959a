"""The mutation run itself: what it changes, what it leaves alone, and that a switched-off mutant does no harm."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from .judge import MOST_TIME, affordable, without_dtype
from .mutants import HEADER, STORAGE, mutants_of, weave

SOURCE = """\
#define RULE(a) a < 2 && a > 0 \\
  && a < 9
constexpr int kSize = 3 < 4 ? 8 : 9;
static int calls = 0;
static void __syncthreads() { ++calls; }
inline int clamp(const int* x, int i, int n) {  // i < n in a comment
  if (i < n && i >= 0) return x[i];
  return n > 0 ? x[n - 1] : -1;
}
#if !defined(SHIVA_SIMT)
inline bool on_the_gpu(int i) { return i < 3; }
#endif
inline int both(const int* x, int i, int n) {
  __syncthreads();
  const char* text = "a < b && c[0]";
  int local[2] = {0, 0};
  local[0] = clamp(x, i, n) + (text == nullptr);
  return local[0];
}
inline int declared(const int (&pairs)[2][3], int i) {
  const bool both = i == 1 &&
                    pairs[0][2] == 2;
  int count = sizeof(int) == 8 ? 5 : 0;
  count += both == true ? 1 : 0;
  return count;
}
inline int moved(const int* rows, int i) {
  const int* row = rows + 2 * i;
  return (row += 1) - rows;
}
"""
MAIN = """
#include <cstdio>
#include <cstdlib>
int main(int, char** arguments) {
  shiva_mutant = std::atoi(arguments[1]);
  const int padded[] = {90, 10, 20, 30, 91, 92};
  const int* x = padded + 1;
  for (int i = -1; i < 5; ++i) std::printf("%d ", both(x, i, 3));
  const int pairs[2][3] = {{0, 1, 2}, {7, 8, 9}};
  std::printf("%d|%d", clamp(x, 0, 0), calls);
  for (int i = 0; i < 2; ++i) std::printf(" %d", declared(pairs, i) + moved(x, i));
}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sample_kernel.cuh"
    path.write_text(SOURCE)
    return path


def test_each_kind_of_mistake_is_found_and_nothing_else(file):
    found = [(m.line, m.rule, m.change.split(" at ")[0]) for m in mutants_of(file)]
    assert sorted(found) == sorted(
        [
            (7, "guard", "no i < n && i >= 0"),
            (7, "guard", "no i >= 0"),
            (7, "bound", "< to <="),
            (7, "bound", ">= to >"),
            (7, "index", "[i] + 1"),
            (8, "bound", "> to >="),
            (8, "guard", "always n > 0"),
            (8, "index", "[n - 1] + 1"),
            (14, "barrier", "no __syncthreads()"),
            (17, "index", "[0] + 1"),
            (18, "index", "[0] + 1"),
            (22, "index", "[0] + 1"),
            (22, "index", "[2] + 1"),
            (24, "guard", "always both == true"),
            (28, "index", "rows + 2 * i + 1"),
            (29, "index", "row += 1 + 1"),
        ]
    )


@pytest.mark.parametrize(
    "line, count",
    [
        ("int end = i + k < n ? i + k : n;", 0),
        ("f(static_cast<int>(n - i < 8 ? n - i : 8), x);", 0),
        ("int m = a > b ? static_cast<int>(b) : a;", 0),
        ("int end = i + k < n ? k : n - i;", 1),
        ("if (a < b) c = d ? a : b;", 1),
    ],
)
def test_a_minimum_has_no_bound_to_mistake(tmp_path, line, count):
    (tmp_path / "sample.cuh").write_text(line + "\n")
    assert sum(mutant.rule == "bound" for mutant in mutants_of(tmp_path / "sample.cuh")) == count


def test_ids_do_not_depend_on_where_the_line_stands(file):
    before = [m.id for m in mutants_of(file)]
    assert len(set(before)) == len(before)
    file.write_text("// one more line\n" + SOURCE)
    assert [m.id for m in mutants_of(file)] == before


def test_weaving_keeps_the_lines(file):
    woven = weave(SOURCE, list(enumerate(mutants_of(file))))
    assert len(woven.splitlines()) == len(SOURCE.splitlines())
    assert woven.splitlines()[0] == SOURCE.splitlines()[0]


def test_each_number_switches_on_its_own_mistake(file, tmp_path):
    mutants = mutants_of(file)
    (tmp_path / "mutation.h").write_text(HEADER)
    storage = STORAGE.replace("{count}", str(len(mutants)))
    woven = weave(SOURCE, list(enumerate(mutants)))
    (tmp_path / "main.cpp").write_text(storage + "#define SHIVA_SIMT\n" + woven + MAIN)
    program = tmp_path / "program"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++20", "-w", "main.cpp", "-o", program], cwd=tmp_path, check=True)

    def output(number: int) -> str:
        return subprocess.run([program, str(number)], capture_output=True, text=True, check=True).stdout.strip()

    expected = {
        "no i < n && i >= 0": "90 10 20 30 91 92 10|6",
        "no i >= 0": "90 10 20 30 30 30 -1|6",
        "< to <=": "30 10 20 30 91 30 10|6",
        ">= to >": "30 30 20 30 30 30 -1|6",
        "[i] + 1": "30 20 30 91 30 30 -1|6",
        "> to >=": "30 10 20 30 30 30 90|6",
        "always n > 0": "30 10 20 30 30 30 90|6",
        "[n - 1] + 1": "91 10 20 30 91 91 -1|6",
        "no __syncthreads()": "30 10 20 30 30 30 -1|0",
    }
    unchanged = "30 10 20 30 30 30 -1|6 1 4"
    assert output(-1) == unchanged
    for number, mutant in enumerate(mutants):
        change = mutant.change.split(" at ")[0]
        if change in expected:
            assert output(number) == expected[change] + " 1 4", str(mutant)
        else:  # the arrays' and the last function's
            assert output(number) != unchanged, str(mutant)


def test_a_mutant_gets_the_quickest_tests_of_every_group_within_the_time():
    tests = {"a1": ("a", 0.1), "a2": ("a", 0.2), "b1": ("b", 3.0), "c1": ("c", MOST_TIME), "a3": ("a", 0.3)}
    assert affordable(tests) == ["a1", "b1", "a2", "a3"]
    assert without_dtype("test_x[a-torch.float16-b]") == without_dtype("test_x[a-torch.float32-b]") != "test_x[a-b]"


def test_only_mutants_that_exist_are_explained_as_survivors():
    cuda = Path(__file__).parents[2] / "csrc" / "cuda"
    ids = {mutant.id for file in cuda.iterdir() for mutant in mutants_of(file)}
    explained = json.loads(Path(__file__).with_name("survivors.json").read_text())
    assert set(explained) <= ids
    assert len(explained) <= 0.05 * len(ids)

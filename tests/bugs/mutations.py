"""Change the equations of the lessons, one operator at a time: does a test notice?

    python tests/bugs/mutations.py            all four lessons
    python tests/bugs/mutations.py cartpole   those whose test file has this in its name

Each of EQUATIONS is changed in one place: + to -, * to /, < to <=, max to min, mean to
sum, a sign dropped, a constant or an index plus one, a call such as .detach() or
.clamp() left out. A change is killed if a test of its lesson fails; the fastest are
tried first. Needs os.fork (Linux, macOS).
"""

import ast
import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import trial
from catalogue import CARTPOLE, GRPO, LANDER, TICTACTOE
from plant import FACTS, HERE, ROOT

RESULTS = HERE / "results" / "mutations.json"
EQUATIONS = {
    CARTPOLE: "returns_to_go subtract_mean reinforce_loss",
    TICTACTOE: "mask_illegal subtract_values actor_loss entropy_bonus critic_loss",
    LANDER: "gae normalise log_probs_and_entropy clipped_surrogate_loss",
    GRPO: "group_advantages completion_mask completion_log_probs kl_estimate grpo_loss",
}

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OPERATORS |= {ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
COMPARISONS = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
COMPARISONS |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot}
COMPARISONS |= {ast.IsNot: ast.Is}
NAMES = {"max": "min", "min": "max", "mean": "sum", "sum": "mean"}
LEFT_OUT = {"detach", "masked_fill", "clamp", "float", "abs", "exp", "reversed"}

# Why a survivor survives, by its change. What is not named here has no excuse.
BECAUSE = {
    "`rewards.abs().max()` to `rewards.abs().min()`": (
        "The line asks whether all rewards are nearly equal; if they are, the largest "
        "and the smallest are the same."
    ),
    "`centred.abs().max() <= 1e-06 * rewards.abs().max()` to "
    "`centred.abs().max() < 1e-06 * rewards.abs().max()`": (
        "They differ where both sides are 0, as all rewards are: then the division "
        "that follows gives 0 as well."
    ),
    "`False` to `True`": "A cache that nobody reads: no value changes.",
    "`0.0` to `1.0`": "Any finite number does: what is filled in is masked afterwards.",
}


class Mutate(ast.NodeTransformer):
    """Changes the place of the given number; `change` then says what it did."""

    def __init__(self, number: int) -> None:
        self.number, self.seen, self.change = number, -1, None
        self.place, self.new = None, ""

    def here(self) -> bool:
        """Is this the place?"""
        self.seen += 1
        return self.seen == self.number

    def replaced(self, old: ast.AST, new: ast.AST) -> ast.AST:
        """Note the change, and where it is in the text."""
        self.change = f"`{ast.unparse(old)}` to `{ast.unparse(new)}`"
        self.place = old.lineno, old.col_offset, old.end_lineno, old.end_col_offset
        self.new = f"({ast.unparse(new)})"
        return ast.copy_location(new, old)

    def visit_BinOp(self, node):  # noqa: N802, the names are ast's
        self.generic_visit(node)
        if type(node.op) in OPERATORS and self.here():
            new = copy.deepcopy(node)
            new.op = OPERATORS[type(node.op)]()
            return self.replaced(node, new)
        return node

    def visit_Compare(self, node):  # noqa: N802
        self.generic_visit(node)
        if type(node.ops[0]) in COMPARISONS and self.here():
            new = copy.deepcopy(node)
            new.ops[0] = COMPARISONS[type(node.ops[0])]()
            return self.replaced(node, new)
        return node

    def visit_UnaryOp(self, node):  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.op, ast.USub | ast.Not) and self.here():
            return self.replaced(node, node.operand)
        return node

    def visit_Constant(self, node):  # noqa: N802
        if isinstance(node.value, bool):
            if self.here():
                return self.replaced(node, ast.Constant(not node.value))
        elif isinstance(node.value, int | float) and self.here():
            return self.replaced(node, ast.Constant(node.value + 1))
        return node

    def visit_Call(self, node):  # noqa: N802
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute):
            if function.attr in NAMES and self.here():
                new = copy.deepcopy(node)
                new.func.attr = NAMES[function.attr]
                return self.replaced(node, new)
            if function.attr in LEFT_OUT and self.here():
                return self.replaced(node, function.value)
        if isinstance(function, ast.Name) and function.id in LEFT_OUT and self.here():
            return self.replaced(node, node.args[0])
        return node


def mutants(script: str) -> list[tuple[str, str, str]]:
    """Each change of a script: function, what was changed, the text of the script."""
    page, found = (ROOT / script).read_text(), []
    functions = {getattr(node, "name", ""): node for node in ast.parse(page).body}
    for name in EQUATIONS[script].split():
        if name not in functions:
            sys.exit(f"{script} has no function {name} any more: see EQUATIONS")
        for number in range(1_000):
            mutate = Mutate(number)
            for line in functions[name].body[1:]:  # not the docstring
                mutate.visit(copy.deepcopy(line))
            if mutate.change is None:
                break
            found.append((name, mutate.change, changed(page, mutate)))
    return found


def changed(page: str, mutate: Mutate) -> str:
    """The text with the change in its place, and nothing else touched."""
    lines = page.splitlines(keepends=True)
    first, start, last, end = mutate.place
    before, after = lines[first - 1][:start], lines[last - 1][end:]
    lines[first - 1 : last] = [before + mutate.new + after]
    text = "".join(lines)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(page))
    return text


def main() -> None:
    """Try every mutant of the lessons that are asked for; keep what survives."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"scripts": {}}
    trial.import_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trial.copy_of_repository(folder)
        for script in [each for each in FACTS if word in FACTS[each]["tests"]]:
            found, alive = mutants(script), []
            seconds = trial.seconds_of(folder, script)
            for function, change, text in found:
                (folder / script).write_text(text)
                if trial.run_tests(folder, script, seconds, "-x")[0]:
                    continue
                because = BECAUSE.get(change, "Not explained.")
                facts = {"function": function, "change": change, "because": because}
                alive.append(facts)
                print(f"survives: {script} {function}: {change}", flush=True)
            shutil.copy(ROOT / script, folder)
            killed = len(found) - len(alive)
            print(f"{script}: {killed} of {len(found)} killed", flush=True)
            facts = {"mutants": len(found), "killed": killed, "survivors": alive}
            kept["scripts"][script] = facts
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

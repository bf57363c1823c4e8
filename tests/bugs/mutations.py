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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import trial
from catalogue import CARTPOLE, GRPO, LANDER, TICTACTOE
from plant import FACTS, HERE, ROOT, functions

RESULTS = HERE / "results" / "mutations.json"
EQUATIONS = {
    CARTPOLE: "returns_to_go subtract_mean reinforce_loss",
    TICTACTOE: "mask_illegal subtract_values actor_loss entropy_bonus critic_loss",
    LANDER: "gae normalise log_probs_and_entropy clipped_surrogate_loss",
    GRPO: "group_advantages completion_mask completion_log_probs kl_estimate grpo_loss",
}

OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
OTHER |= {ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
OTHER |= {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
OTHER |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
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


def changed(node: ast.AST) -> ast.AST | None:
    """What could stand in the place of a piece of code, if anything."""
    new = copy.deepcopy(node)
    match node:
        case ast.BinOp(op=operator) if type(operator) in OTHER:
            new.op = OTHER[type(operator)]()
        case ast.Compare(ops=[operator, *_]) if type(operator) in OTHER:
            new.ops[0] = OTHER[type(operator)]()
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            new = node.operand
        case ast.Constant(value=bool()):
            new.value = not node.value
        case ast.Constant(value=int() | float()):
            new.value += 1
        case ast.Call(func=ast.Attribute(attr=name)) if name in NAMES:
            new.func.attr = NAMES[name]
        case ast.Call(func=ast.Attribute(attr=name)) if name in LEFT_OUT:
            new = node.func.value
        case ast.Call(func=ast.Name(id=name)) if name in LEFT_OUT:
            new = node.args[0]
        case _:
            return None
    return new


def mutants(script: str) -> list[tuple[str, str, str]]:
    """Each change of a script: function, what was changed, the text of the script."""
    page = (ROOT / script).read_text()
    there, found = functions(page), []
    for name in EQUATIONS[script].split():
        if name not in there:
            sys.exit(f"{script} has no function {name} any more: see EQUATIONS")
        pieces = ast.walk(ast.Module(there[name].body[1:]))  # not the docstring
        for old in pieces:
            if new := changed(old):
                change = f"`{ast.unparse(old)}` to `{ast.unparse(new)}`"
                lines = page.splitlines(keepends=True)
                before = lines[old.lineno - 1][: old.col_offset]
                after = lines[old.end_lineno - 1][old.end_col_offset :]
                text = f"{before}({ast.unparse(new)}){after}"
                lines[old.lineno - 1 : old.end_lineno] = [text]
                found.append((name, change, "".join(lines)))
    return found


def main() -> None:
    """Try every mutant of the lessons that are asked for; keep what survives."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    kept = json.loads(RESULTS.read_text())
    trial.import_libraries()
    with trial.copy_of_repository() as folder:
        for script in [each for each in FACTS if word in FACTS[each]["tests"]]:
            found, alive = mutants(script), []
            for function, change, text in found:
                if trial.red_tests(folder, script, script, text, at_most=1):
                    continue
                because = BECAUSE.get(change, "Not explained.")
                facts = {"function": function, "change": change, "because": because}
                alive.append(facts)
                print(f"survives: {script} {function}: {change}", flush=True)
            killed = len(found) - len(alive)
            print(f"{script}: {killed} of {len(found)} killed", flush=True)
            facts = {"mutants": len(found), "killed": killed, "survivors": alive}
            kept["scripts"][script] = facts
            RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()

# ruff: noqa: F821, the names in these functions are those of the lessons
"""The bugs of the museum: what is wrong, how people come to write it, who met it.

A bug by `lines`: how people come to write it, and pairs (right, wrong) of code, where
`right` stands in the script exactly once, comments and docstrings left out.

A `function` takes the place of the body of the lesson's function, so that it survives
a rename of the variables there. `# WRONG` ends the line with the mistake and is not
planted. The docstring says how people come to write it.

Both begin with the same facts: the name of the bug, whose first word tells the script,
or that of the function; the cheapest of the CHECKS that finds it; its source (a thread
of those who met it, or "common": in too many places to name one); and what these people
said they saw, a key of SYMPTOMS in symptoms.py, unless they named nothing that can be
seen. Last come the Settings of this bug and of the healthy run beside it, if it needs
some.
"""

from collections.abc import Callable
from dataclasses import dataclass

CARTPOLE, LANDER, GRPO = "train_cartpole.py", "lunarlander_ppo.py", "grpo_training.py"
TICTACTOE, GAME = "tictactoe_actorcritic.py", "tictactoe_env.py"
SCRIPTS = {"cartpole": CARTPOLE, "tictactoe": TICTACTOE, "lander": LANDER, "grpo": GRPO}

# The checks of README.md, "How to debug", in their order.
CHECKS = ["data", "entropy", "ratio", "gradients", "sign", "padding", "by hand"]
CHECKS += ["one batch", "easy task", "evaluate twice"]


@dataclass(frozen=True, eq=False)
class Bug:
    """One bug; what is not said here is explained above."""

    name: str  # lesson and bug, as `museum.py` takes it
    lesson: str  # the script that trains
    file: str  # the script that is changed
    check: str
    source: str
    reported: str
    settings: dict
    why: str
    edits: tuple  # pairs (right, wrong), or one of a function's name and the wrong one


BUGS: list[Bug] = []


def lines(name, check, source, reported="", file="", **settings) -> Callable:
    """To be called with how people come to write it, and the pairs."""
    lesson = SCRIPTS[name.split("-")[0]]
    facts = name, lesson, file or lesson, check, source, reported, settings
    return lambda why, *edits: BUGS.append(Bug(*facts, why, edits))


def function(target, *facts, **settings) -> Callable:
    """The function that is decorated is the wrong one."""

    def keep(wrong: Callable) -> None:
        name = wrong.__name__.replace("_", "-")
        lines(name, *facts, **settings)(wrong.__doc__, (target, wrong))

    return keep


# ------------------------------------------------------------------------------------
# Lesson 1: REINFORCE
# ------------------------------------------------------------------------------------


@function("reinforce_loss", "sign", "common", "falls")
def cartpole_sign(log_probs, advantages):
    """The paper maximises, the optimizer minimises, and the minus is lost."""
    return (log_probs * advantages).mean()  # WRONG


lines("cartpole-relu-on-logits", "gradients", "ML_practice#2", "flat")(
    "Every layer got its activation, the last one too.",
    ("self.layers(observations)", "self.layers(observations).relu()"),
)
lines("cartpole-softmax-twice", "easy task", "common", "below")(
    "The network ends in a softmax, and Categorical(logits=...) adds its own.",
    ("self.layers(observations)", "self.layers(observations).softmax(1)"),
)
lines("cartpole-action-drawn-again", "sign", "common", "flat")(
    "The distribution is at hand, the action that was taken is not.",
    (".log_prob(actions[alive])", ".log_prob(distribution.sample())"),
)


@function("returns_to_go", "by hand", "spinningup#50, PR 126", "hidden")
def cartpole_reward_one_step_late(rewards, gamma):
    """Two lines in the wrong order: the action's own reward is left out."""
    returns = torch.zeros_like(rewards)
    next_return = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        returns[t] = next_return  # WRONG
        next_return = rewards[t] + gamma * next_return
    return returns


lines("cartpole-next-observation-stored", "data", "UniDexGrasp2#3")(
    "`observations = next_observations` stands one line too early.",
    ("steps.append((observations,", "steps.append((next_observations,"),
)
lines("cartpole-padding-trained", "padding", "cleanrl#499")(
    "The mask is made and then not used: shapes fit without it.",
    ("subtract_mean(returns[alive])", "subtract_mean(returns.flatten())"),
    ("policy(observations[alive])", "policy(observations.flatten(0, 1))"),
    ("log_prob(actions[alive])", "log_prob(actions.flatten())"),
)
lines("cartpole-no-baseline", "by hand", "a textbook's exercise")(
    "The expected gradient is the same without it.",
    ("returns - returns.mean()", "returns"),
)
lines("cartpole-mean-per-episode", "by hand", "common")(
    "Each episode is processed by itself, so its own mean is at hand.",
    (
        "subtract_mean(returns[alive])",
        "(returns - returns.sum(0) / alive.sum(0))[alive]",
    ),
)
lines("cartpole-zero-grad-after-backward", "gradients", "common", "flat")(
    "The three lines are typed from memory, in another order.",
    ("optimizer.zero_grad()", "loss.backward()"),
    ("loss.backward()", "optimizer.zero_grad()"),
)
lines("cartpole-no-zero-grad", "one batch", "common")(
    "PyTorch adds to .grad, other frameworks do not.",
    ("optimizer.zero_grad()", ""),
)
lines("cartpole-same-starts", "data", "stable-baselines#675")(
    "Seeding every reset looks like care for reproducibility.",
    ("seed = None", ""),
)
lines("cartpole-sampled-score", "evaluate twice", "stable-baselines#832")(
    "The evaluation reuses the function that collects, and its default.",
    ("HELD_OUT_SEED, greedy=True", "HELD_OUT_SEED, greedy=False"),
)

# ------------------------------------------------------------------------------------
# Lesson 2: actor-critic, self-play
# ------------------------------------------------------------------------------------

lines(
    "tictactoe-reward-to-the-side-to-move", "data", "PettingZoo#1147, PR 1203", "falls"
)(
    "After the step it is the other side's turn, and the reward looks like hers.",
    ("learner_turn, rewards, -rewards", "learner_turn, -rewards, rewards"),
)
lines(
    "tictactoe-full-board-before-three-in-a-row",
    "by hand",
    "muzero-general#37",
    file=GAME,
)(
    "The cheap test comes first: a win with the last stone becomes a draw.",
    ("won = has_won(boards)", "won = has_won(boards) & (boards == 0).any(axis=-1)"),
)
lines("tictactoe-illegal-logits-0", "data", "stable-baselines PR 505")(
    "'Masked' is taken for 'multiplied by the mask'; but exp(0) = 1.",
    ("action_mask == 0, -torch.inf", "action_mask == 0, 0.0"),
)
lines("tictactoe-opponent-is-the-actor", "gradients", "common")(
    "An assignment copies nothing in Python.",
    ("opponent = copy.deepcopy(actor)", "opponent = actor"),
)
lines("tictactoe-opponent-never-renewed", "gradients", "common", "loses lines")(
    "state_dict() gives a new dict: updating it changes no network.",
    ("opponent.load_state_dict(", "opponent.state_dict().update("),
)
lines("tictactoe-opponent-s-moves-trained", "data", "common")(
    "All moves are in the buffer, and all get the learner's result.",
    ("masks, actions, learner_moved))", "masks, actions, alive))"),
)
lines("tictactoe-learner-always-first", "data", "common", "one seat")(
    "The loop begins with the learner's move.",
    ("torch.arange(GAMES_PER_UPDATE) % 2 == 0", "torch.arange(GAMES_PER_UPDATE) >= 0"),
)
lines("tictactoe-values-not-squeezed", "by hand", "Spinning Up 2.2, RLinf#1568")(
    "(B,) minus (B, 1) is (B, B), without an error.",
    (".squeeze(-1)", ""),
)
lines(
    "tictactoe-advantage-not-detached",
    "gradients",
    "async-rl#8, keras-io#194",
    "entropy 0",
)(
    "The formula has no 'detach', and nothing fails without it.",
    ("returns - values.detach()", "returns - values"),
)
lines("tictactoe-entropy-sign", "sign", "pg-is-all-you-need#37", "below")(
    "A penalty or a bonus? The loss subtracts this already.",
    ("beta * entropies.mean()", "-beta * entropies.mean()"),
)
lines("tictactoe-critic-idle", "by hand", "pytorch-rl#2")(
    "The critic is trained and printed, and nobody asks it.",
    ("returns - values.detach()", "returns"),
)
lines("tictactoe-critic-without-gradient", "gradients", "CoursIA PR 15256")(
    "A value was turned into a plain number too early.",
    ("(returns - values) ** 2", "(returns - values.detach()) ** 2"),
)


# ------------------------------------------------------------------------------------
# Lesson 3: PPO
# ------------------------------------------------------------------------------------


lines("lander-ended-one-row-off", "by hand", "RoboVerse PR 814, SB3#105")(
    "Half of all code stores 'done' before the step, half of it after.",
    ("(1 - ended[t])", "(1 - ended[t - 1])"),
)
lines(
    "lander-sum-runs-across-the-end",
    "by hand",
    "Super-mario-bros-PPO#21",
    "critic blind",
)(
    "Eq. (11) of the paper has no ends of episodes in it.",
    (" * (1 - ended[t])", ""),
)
lines("lander-one-flag-for-both-ends", "by hand", "cleanrl#198", "below")(
    "Older environments had one flag, `done`.",
    ("next_values * (1 - terminated)", "next_values * (1 - ended)"),
)
lines("lander-value-of-the-reset", "data", "mujoco_playground PR 351")(
    "The next observation after an autoreset is that of another episode.",
    ('next_observations[i] = info["final_obs"][i]', ""),
)
lines("lander-normalise-bracket", "by hand", "pytorch-cpp-rl#14", "hidden")(
    "A bracket.",
    ("(advantages - advantages.mean()) /", "advantages - advantages.mean() /"),
)


@function("clipped_surrogate_loss", "by hand", "takuseno/ppo#3")
def lander_min_before_the_advantage(log_probs, old_log_probs, advantages, clip_eps):
    """A common factor is taken out of the min; but it can be negative."""
    ratio = torch.exp(log_probs - old_log_probs)
    clipped_ratio = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -(torch.min(ratio, clipped_ratio) * advantages).mean()  # WRONG


lines("lander-ratio-without-gradient", "gradients", "common", "flat")(
    "One detach too many.",
    ("exp(log_probs - old_log_probs)", "exp(log_probs.detach() - old_log_probs)"),
)
lines("lander-rate-never-falls", "gradients", "tianshou#774, no bug there")(
    "The optimizer has two places that look like its learning rate.",
    ('optimizer.param_groups[0]["lr"]', 'optimizer.defaults["lr"]'),
)
lines("lander-not-shuffled", "data", "common")(
    "Slices of the batch are minibatches, too.",
    ("torch.randperm(", "torch.arange("),
)
lines("lander-returns-of-normalised-advantages", "by hand", "common")(
    "Advantages are normalised in place, and only then are the returns made.",
    (
        '"returns": (values + advantages).flatten()',
        '"returns": values.flatten() + normalise(advantages.flatten())',
    ),
)
lines("lander-entropy-sign", "sign", "pg-is-all-you-need#37", "below")(
    "All terms of a loss are added, are they not?",
    ("- ENTROPY_BONUS *", "+ ENTROPY_BONUS *"),
)

# ------------------------------------------------------------------------------------
# Lesson 4: GRPO
# ------------------------------------------------------------------------------------


lines("grpo-no-baseline", "ratio", "common")(
    "The reward model's score is taken for an advantage.",
    ("rewards - rewards.mean()", "rewards"),
)
lines("grpo-end-not-trained", "by hand", "RAGEN#59", "never ends")(
    "The end token is taken for padding, whose number it often shares.",
    (".cumsum(1) - ends", ".cumsum(1)"),
)


@function("completion_mask", "padding", "common")
def grpo_tokens_after_the_end_trained(completion_ids, end_ids):
    """Everything that was generated is trained."""
    return torch.ones_like(completion_ids)  # WRONG


lines("grpo-logits-one-token-off", "by hand", "maxtext#2103")(
    "The logits at place t are about the token at t + 1. The lesson notices and refuses to "
    "start, so the bug takes the check with it, which few programs have.",
    ("[prompt_ids, completion_ids], 1)[:, :-1]", "[prompt_ids, completion_ids], 1)"),
    ("check_policy(policy, tokenizer)", ""),
)
lines(
    "grpo-temperature-only-in-drawing", "ratio", "trl#4159, PR 3029", TEMPERATURE=0.7
)(
    "The generation settings belong to generation, it seems.",
    (" / temperature if temperature != 1 else logits.float()", ""),
)
lines("grpo-old-is-always-new", "ratio", "tensorforce#312", "ratio 1", INNER_STEPS=4)(
    "With one gradient step a group it makes no difference, later it does.",
    (
        'batch.setdefault("old_log_probs", log_probs.detach())',
        'batch["old_log_probs"] = log_probs.detach()',
    ),
)


lines("grpo-k3-turned-round", "by hand", "hands-on-modern-rl#27", KL_COEF=0.4)(
    "Everywhere else in the script the ratio is new over old.",
    ("= ref_log_probs - log_probs", "= log_probs - ref_log_probs"),
)
lines("grpo-kl-sign", "sign", "ToolRL#52", "falls", KL_COEF=0.4)(
    "Objective or loss? The sign of the penalty depends on it.",
    ("- kl_coef * ", "+ kl_coef * "),
)
lines("grpo-reference-is-the-policy", "gradients", "common", "KL 0", KL_COEF=0.4)(
    "An assignment copies nothing in Python.",
    ("copy.deepcopy(policy)", "policy"),
)
lines("grpo-bfloat16-weights", "gradients", "ml-by-hand PR 85")(
    "It halves the memory; but a step of LR is below the weights' resolution.",
    ('"dtype": torch.float32', '"dtype": torch.bfloat16'),
)
lines("grpo-accumulation-not-divided", "one batch", "NeMo-RL#84", MICRO_BATCH_SIZE=2)(
    "backward() adds up, the mean over the parts is one's own business.",
    ('(batch["share"] * loss).backward()', "loss.backward()"),
)


@function("grpo_loss", "padding", "OpenRLHF PR 1240", "NaN")
def grpo_padding_times_0(
    log_probs, old_log_probs, ref_log_probs, advantages, mask, clip_eps, kl_coef
):
    """Times 0 is 0, except for infinity and NaN."""
    ratio = (log_probs - old_log_probs).exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    advantages = advantages.unsqueeze(1)
    objective = torch.min(ratio * advantages, clipped * advantages)
    if ref_log_probs is not None:
        objective = objective - kl_coef * kl_estimate(log_probs, ref_log_probs)
    objective = objective * mask  # WRONG
    return -(objective.sum(1) / mask.sum(1)).mean()

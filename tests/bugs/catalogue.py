"""The bugs of the museum: which lines, who makes this mistake, which test catches it.

An entry is a dict:

    name      lesson and bug, as `museum.py` takes it
    file      the script of the lesson that is changed
    edits     pairs (right, wrong) of source text; `right` stands in the file exactly once
    why       one sentence: how people come to write it
    source    where it was reported; "common": in too many places to name one
    reported  what those who met it said they saw, a key of SYMPTOMS in symptoms.py, or
              None if they named nothing that can be seen in a curve
    test      the test of the suite that fails if the bug is planted
    settings  Settings for this bug and for the healthy run beside it, if it needs some
"""

CARTPOLE, LANDER, GRPO = "train_cartpole.py", "lunarlander_ppo.py", "grpo_training.py"
TICTACTOE, GAME = "tictactoe_actorcritic.py", "tictactoe_env.py"

BUGS = [
    # --------------------------------------------------------------------------------
    # Lesson 1: REINFORCE
    # --------------------------------------------------------------------------------
    {
        "name": "cartpole-sign",
        "file": CARTPOLE,
        "edits": [
            (
                "    return -(log_probs * advantages).mean()",
                "    return (log_probs * advantages).mean()",
            )
        ],
        "why": "The paper maximises, the optimizer minimises, and the minus is lost.",
        "source": "common",
        "reported": "falls",
        "test": "test_one_step_makes_a_good_action_likelier_and_a_bad_one_rarer",
    },
    {
        "name": "cartpole-relu-on-logits",
        "file": CARTPOLE,
        "edits": [
            (
                "            nn.Linear(hidden_units, 2),  # left, right\n",
                "            nn.Linear(hidden_units, 2),  # left, right\n"
                "            nn.ReLU(),\n",
            )
        ],
        "why": "Every layer got its activation, the last one too.",
        "source": "Bowen1911/ML_practice#2",
        "reported": "flat",
        "test": "test_logits_of_either_sign_come_out_and_every_weight_gets_a_gradient",
    },
    {
        "name": "cartpole-softmax-over-batch",
        "file": CARTPOLE,
        "edits": [
            (
                "        return self.layers(observations)\n",
                "        return self.layers(observations).softmax(0).log()\n",
            )
        ],
        "why": "softmax(0) looks right as long as one observation is passed at a time.",
        "source": "bindsnet#577, DeepReinforcementLearningInAction#32",
        "reported": "flat",
        "test": "test_an_observation_s_logits_do_not_depend_on_the_others_in_the_batch",
    },
    {
        "name": "cartpole-softmax-twice",
        "file": CARTPOLE,
        "edits": [
            (
                "        return self.layers(observations)\n",
                "        return self.layers(observations).softmax(1)\n",
            )
        ],
        "why": "The network ends in a softmax, and Categorical(logits=...) adds its own.",
        "source": "ekapolc/RL_course_2019 PR 6",
        "reported": "below",
        "test": "test_logits_of_either_sign_come_out_and_every_weight_gets_a_gradient",
    },
    {
        "name": "cartpole-argmax-while-collecting",
        "file": CARTPOLE,
        "edits": [
            (
                "        actions = logits.argmax(1) if greedy else "
                "Categorical(logits=logits).sample()\n",
                "        actions = logits.argmax(1)\n",
            )
        ],
        "why": "Taking the best action sounds better than drawing one.",
        "source": "deep-rl-class#582",
        "reported": None,
        "test": "test_greedy_play_takes_the_likeliest_action_and_sampling_draws",
    },
    {
        "name": "cartpole-action-drawn-again",
        "file": CARTPOLE,
        "edits": [
            (
                "choice.log_prob(actions[alive]), advantages)",
                "choice.log_prob(choice.sample()), advantages)",
            )
        ],
        "why": "The distribution is at hand, the action that was taken is not.",
        "source": "common",
        "reported": "flat",
        "test": "test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns",
    },
    {
        "name": "cartpole-returns-backwards",
        "file": CARTPOLE,
        "edits": [
            (
                "    for t in reversed(range(len(rewards))):\n",
                "    for t in range(len(rewards)):\n",
            )
        ],
        "why": "A running sum is a running sum: this one adds up what came before.",
        "source": "common",
        "reported": None,
        "test": "test_returns_to_go_equals_the_double_loop",
    },
    {
        "name": "cartpole-reward-one-step-late",
        "file": CARTPOLE,
        "edits": [
            (
                "        next_return = rewards[t] + gamma * next_return\n"
                "        returns[t] = next_return\n",
                "        returns[t] = next_return\n"
                "        next_return = rewards[t] + gamma * next_return\n",
            )
        ],
        "why": "Two lines in the wrong order: the action's own reward is left out.",
        "source": "spinningup#50, PR 126",
        "reported": "hidden",
        "test": "test_returns_to_go_equals_the_double_loop",
    },
    {
        "name": "cartpole-next-observation-stored",
        "file": CARTPOLE,
        "edits": [
            (
                "        steps.append((observations, actions, rewards * alive, alive))",
                "        steps.append((next_observations, actions, rewards * alive, alive))",
            )
        ],
        "why": "`obs = next_obs` one line too early.",
        "source": "UniDexGrasp2#3",
        "reported": None,
        "test": "test_observation_and_action_of_one_index_belong_together",
    },
    {
        "name": "cartpole-return-across-the-end",
        "file": CARTPOLE,
        "edits": [
            (
                "        steps.append((observations, actions, rewards * alive, alive))",
                "        steps.append((observations, actions, rewards, alive))",
            )
        ],
        "why": "Vector environments start again by themselves, and go on to give rewards.",
        "source": "PPO-PyTorch#8",
        "reported": None,
        "test": "test_every_step_of_an_episode_is_kept_and_none_after_its_end",
    },
    {
        "name": "cartpole-padding-trained",
        "file": CARTPOLE,
        "edits": [
            (
                "subtract_mean(returns[alive])  # (B,)",
                "subtract_mean(returns.flatten())",
            ),
            (
                "Categorical(logits=policy(observations[alive]))",
                "Categorical(logits=policy(observations.flatten(0, 1)))",
            ),
            ("choice.log_prob(actions[alive])", "choice.log_prob(actions.flatten())"),
        ],
        "why": "The mask is made and then not used: shapes fit without it.",
        "source": "cleanrl#499",
        "reported": None,
        "test": "test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns",
    },
    {
        "name": "cartpole-no-baseline",
        "file": CARTPOLE,
        "edits": [
            (
                "    return returns - returns.mean()\n",
                "    return returns\n",
            )
        ],
        "why": "The expected gradient is the same without it.",
        "source": "textbook",
        "reported": "slow",
        "test": "test_the_docstring_cases_worked_by_hand",
    },
    {
        "name": "cartpole-mean-per-episode",
        "file": CARTPOLE,
        "edits": [
            (
                "subtract_mean(returns[alive])  # (B,)",
                "(returns - returns.sum(0) / alive.sum(0))[alive]",
            )
        ],
        "why": "Each episode is processed by itself, so its own mean is at hand.",
        "source": "common",
        "reported": "slow",
        "test": "test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns",
    },
    {
        "name": "cartpole-zero-grad-after-backward",
        "file": CARTPOLE,
        "edits": [
            (
                "            optimizer.zero_grad()\n            loss.backward()\n",
                "            loss.backward()\n            optimizer.zero_grad()\n",
            )
        ],
        "why": "The three lines are typed from memory, in another order.",
        "source": "common",
        "reported": "flat",
        "test": "test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns",
    },
    {
        "name": "cartpole-no-zero-grad",
        "file": CARTPOLE,
        "edits": [
            (
                "            optimizer.zero_grad()\n            loss.backward()\n",
                "            loss.backward()\n",
            )
        ],
        "why": "PyTorch adds to .grad, other frameworks do not.",
        "source": "common",
        "reported": None,
        "test": "test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns",
    },
    {
        "name": "cartpole-same-starts",
        "file": CARTPOLE,
        "edits": [
            (
                "            seed = None if scores else SEED\n",
                "            seed = SEED\n",
            )
        ],
        "why": "Seeding every reset looks like care for reproducibility.",
        "source": "stable-baselines#675",
        "reported": None,
        "test": "test_only_the_first_episodes_start_from_the_seed",
    },
    {
        "name": "cartpole-probability-for-its-log",
        "file": CARTPOLE,
        "edits": [
            (
                "choice.log_prob(actions[alive]), advantages)",
                "choice.log_prob(actions[alive]).exp(), advantages)",
            )
        ],
        "why": "'Raise the probability of good actions' is taken at its word.",
        "source": "common",
        "reported": None,
        "test": "test_the_update_is_that_of_the_actions_taken_and_of_their_own_returns",
    },
    {
        "name": "cartpole-sampled-score",
        "file": CARTPOLE,
        "edits": [
            (
                "evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy=True)",
                "evaluate(policy, HELD_OUT_EPISODES, HELD_OUT_SEED, greedy=False)",
            )
        ],
        "why": "The evaluation reuses the function that collects, and its default.",
        "source": "SB3#1063, stable-baselines#832",
        "reported": "report wrong",
        "test": "test_the_final_score_is_that_of_greedy_play",
    },
    # --------------------------------------------------------------------------------
    # Lesson 2: actor-critic, self-play
    # --------------------------------------------------------------------------------
    {
        "name": "tictactoe-reward-to-the-side-to-move",
        "file": TICTACTOE,
        "edits": [
            (
                "torch.where(learner_turn, rewards, -rewards)",
                "torch.where(learner_turn, -rewards, rewards)",
            )
        ],
        "why": "After the step it is the other side's turn, and the reward looks like hers.",
        "source": "PettingZoo PR 1203, #1147",
        "reported": "falls",
        "test": "test_collected_games_replay_move_for_move_with_the_right_seat_and_result",
    },
    {
        "name": "tictactoe-loser-gets-0",
        "file": TICTACTOE,
        "edits": [
            (
                "torch.where(learner_turn, rewards, -rewards)",
                "torch.where(learner_turn, rewards, 0 * rewards)",
            )
        ],
        "why": "The environment rewards the mover, and the loser did not move.",
        "source": "muzero-general#56",
        "reported": None,
        "test": "test_collected_games_replay_move_for_move_with_the_right_seat_and_result",
    },
    {
        "name": "tictactoe-full-board-before-three-in-a-row",
        "file": GAME,
        "edits": [
            (
                "    won = has_won(boards)\n    full = (boards != 0).all(axis=-1)\n",
                "    full = (boards != 0).all(axis=-1)\n"
                "    won = has_won(boards) & ~full\n",
            )
        ],
        "why": "The cheap test comes first: a win with the last stone becomes a draw.",
        "source": "muzero-general#37",
        "reported": None,
        "test": "test_a_full_board_won_with_the_last_stone_is_a_win_and_no_draw",
    },
    {
        "name": "tictactoe-not-turned-for-the-second-player",
        "file": TICTACTOE,
        "edits": [
            (
                "        boards = torch.from_numpy(observations)\n",
                "        boards = torch.from_numpy(observations) * (-1) ** ply\n",
            )
        ],
        "why": "Training shows the board as X sees it, playing as the side to move does.",
        "source": "alpha-zero-general#273, AgileRL PR 201",
        "reported": "one seat",
        "test": "test_collected_games_replay_move_for_move_with_the_right_seat_and_result",
    },
    {
        "name": "tictactoe-illegal-logits-0",
        "file": TICTACTOE,
        "edits": [
            (
                "    return logits.masked_fill(action_mask == 0, -torch.inf)",
                "    return logits.masked_fill(action_mask == 0, 0.0)",
            )
        ],
        "why": "'Masked' is taken for 'multiplied by the mask'; but exp(0) = 1.",
        "source": "stable-baselines PR 505",
        "reported": "illegal",
        "test": "test_no_logits_however_adversarial_let_an_illegal_move_through",
    },
    {
        "name": "tictactoe-mask-of-the-first-board",
        "file": TICTACTOE,
        "edits": [
            (
                "        observations, rewards, terminated, _, infos = env.step",
                "        observations, rewards, terminated, _, _ = env.step",
            )
        ],
        "why": "The mask is read when the game begins and never again.",
        "source": "common",
        "reported": "illegal",
        "test": "test_collected_games_replay_move_for_move_with_the_right_seat_and_result",
    },
    {
        "name": "tictactoe-mask-not-in-the-loss",
        "file": TICTACTOE,
        "edits": [
            (
                "Categorical(logits=mask_illegal(actor(observations), masks))",
                "Categorical(logits=actor(observations))",
            )
        ],
        "why": "Drawing needs the mask, or the game stops; the loss runs without it.",
        "source": "gflownet PR 12",
        "reported": None,
        "test": "test_the_update_uses_masked_probabilities_and_each_part_of_the_loss",
    },
    {
        "name": "tictactoe-opponent-is-the-actor",
        "file": TICTACTOE,
        "edits": [
            (
                "    opponent = copy.deepcopy(actor)\n",
                "    opponent = actor\n",
            )
        ],
        "why": "An assignment copies nothing in Python.",
        "source": "reversi-alpha-zero#38",
        "reported": None,
        "test": "test_the_opponent_is_a_frozen_copy_and_is_renewed_only_when_due",
    },
    {
        "name": "tictactoe-opponent-never-renewed",
        "file": TICTACTOE,
        "edits": [
            (
                "                opponent.load_state_dict(actor.state_dict())\n",
                "                opponent.state_dict().update(actor.state_dict())\n",
            )
        ],
        "why": "state_dict() gives a new dict: updating it changes no network.",
        "source": "reversi-alpha-zero#38",
        "reported": "loses lines",
        "test": "test_the_opponent_is_a_frozen_copy_and_is_renewed_only_when_due",
    },
    {
        "name": "tictactoe-opponent-s-moves-trained",
        "file": TICTACTOE,
        "edits": [
            (
                "        steps.append((boards, masks, actions, learner_moved))",
                "        steps.append((boards, masks, actions, alive))",
            )
        ],
        "why": "All moves are in the buffer, and all get the learner's result.",
        "source": "common",
        "reported": None,
        "test": "test_collected_games_replay_move_for_move_with_the_right_seat_and_result",
    },
    {
        "name": "tictactoe-learner-always-first",
        "file": TICTACTOE,
        "edits": [
            (
                "    learner_first = torch.arange(GAMES_PER_UPDATE) % 2 == 0",
                "    learner_first = torch.arange(GAMES_PER_UPDATE) >= 0",
            )
        ],
        "why": "The loop begins with the learner's move.",
        "source": "common",
        "reported": "one seat",
        "test": "test_the_opponent_is_a_frozen_copy_and_is_renewed_only_when_due",
    },
    {
        "name": "tictactoe-values-not-squeezed",
        "file": TICTACTOE,
        "edits": [
            (
                "        return self.layers(observations.float()).squeeze(-1)",
                "        return self.layers(observations.float())",
            )
        ],
        "why": "(B,) minus (B, 1) is (B, B), without an error.",
        "source": "Spinning Up exercise 2.2, RLinf#1568",
        "reported": None,
        "test": "test_values_have_the_shape_of_the_returns",
    },
    {
        "name": "tictactoe-advantage-not-detached",
        "file": TICTACTOE,
        "edits": [
            (
                "    return returns - values.detach()",
                "    return returns - values",
            )
        ],
        "why": "The formula has no 'detach', and nothing fails without it.",
        "source": "coreylynch/async-rl#8, keras-io#194",
        "reported": "entropy 0",
        "test": "test_the_actors_loss_teaches_the_critic_nothing",
    },
    {
        "name": "tictactoe-entropy-sign",
        "file": TICTACTOE,
        "edits": [
            (
                "            loss = policy_loss - bonus + critic_loss(values, returns)",
                "            loss = policy_loss + bonus + critic_loss(values, returns)",
            )
        ],
        "why": "All terms of a loss are added, are they not?",
        "source": "pg-is-all-you-need#37, open_spiel#962",
        "reported": "below",
        "test": "test_the_update_uses_masked_probabilities_and_each_part_of_the_loss",
    },
    {
        "name": "tictactoe-critic-idle",
        "file": TICTACTOE,
        "edits": [
            (
                "            advantages = subtract_values(returns, values)",
                "            advantages = returns",
            )
        ],
        "why": "The critic is trained and printed, and nobody asks it.",
        "source": "bentrevett/pytorch-rl#2",
        "reported": "slow",
        "test": "test_the_update_uses_masked_probabilities_and_each_part_of_the_loss",
    },
    {
        "name": "tictactoe-critic-without-gradient",
        "file": TICTACTOE,
        "edits": [
            (
                "    return ((returns - values) ** 2).mean()",
                "    return ((returns - values.detach()) ** 2).mean()",
            )
        ],
        "why": "A value was turned into a plain number too early.",
        "source": "CoursIA PR 15256",
        "reported": None,
        "test": "test_the_update_uses_masked_probabilities_and_each_part_of_the_loss",
    },
    # --------------------------------------------------------------------------------
    # Lesson 3: PPO
    # --------------------------------------------------------------------------------
    {
        "name": "lander-ended-one-row-off",
        "file": LANDER,
        "edits": [
            (
                "deltas[t] + gamma * lam * (1 - ended[t]) * next_advantage",
                "deltas[t] + gamma * lam * (1 - ended[t - 1]) * next_advantage",
            )
        ],
        "why": "Half of all code stores 'done' before the step, half of it after.",
        "source": "RoboVerse PR 814, SB3#105",
        "reported": None,
        "test": "test_gae_equals_the_double_loop_with_every_end_at_every_position",
    },
    {
        "name": "lander-sum-runs-across-the-end",
        "file": LANDER,
        "edits": [
            (
                "deltas[t] + gamma * lam * (1 - ended[t]) * next_advantage",
                "deltas[t] + gamma * lam * next_advantage",
            )
        ],
        "why": "Eq. (11) of the paper has no ends of episodes in it.",
        "source": "Super-mario-bros-PPO#21",
        "reported": "critic blind",
        "test": "test_gae_equals_the_double_loop_with_every_end_at_every_position",
    },
    {
        "name": "lander-one-flag-for-both-ends",
        "file": LANDER,
        "edits": [
            (
                '    ends = rollout["terminated"], rollout["ended"]\n',
                '    ends = rollout["ended"], rollout["ended"]\n',
            )
        ],
        "why": "Older environments had one flag, `done`.",
        "source": "cleanrl#198",
        "reported": "below",
        "test": "test_a_time_limit_does_not_lower_the_value_but_a_real_end_does",
    },
    {
        "name": "lander-value-of-the-reset",
        "file": LANDER,
        "edits": [
            (
                '            led_to[i] = info["final_obs"][i]\n',
                "",
            )
        ],
        "why": "The next observation after an autoreset is that of another episode.",
        "source": "mujoco_playground PR 351, jumanji PR 223",
        "reported": None,
        "test": "test_the_last_observation_of_an_episode_is_kept_and_the_next_row_is_a_"
        "new_one",
    },
    {
        "name": "lander-normalise-bracket",
        "file": LANDER,
        "edits": [
            (
                "(advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-4)",
                "advantages - advantages.mean() / (advantages.std(correction=0) + 1e-4)",
            )
        ],
        "why": "A bracket.",
        "source": "pytorch-cpp-rl#14",
        "reported": "hidden",
        "test": "test_the_docstring_cases_worked_by_hand",
    },
    {
        "name": "lander-advantages-not-normalised",
        "file": LANDER,
        "edits": [
            (
                '        "advantages": normalise(advantages.flatten()),',
                '        "advantages": advantages.flatten(),',
            )
        ],
        "why": "The paper does not mention it.",
        "source": "SB3 PR 1025",
        "reported": "slow",
        "test": "test_the_batch_holds_normalised_advantages_and_returns_that_are_not",
    },
    {
        "name": "lander-max-for-min",
        "file": LANDER,
        "edits": [
            (
                "    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()",
                "    return torch.min(-ratio * advantages, -clipped_ratio * advantages)"
                ".mean()",
            )
        ],
        "why": "The minus is moved inside, and min should have become max.",
        "source": "baselines#1156",
        "reported": "flat",
        "test": "test_clipped_loss_has_the_right_value_and_gradient_in_each_region",
    },
    {
        "name": "lander-min-before-the-advantage",
        "file": LANDER,
        "edits": [
            (
                "    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()",
                "    return -(torch.min(ratio, clipped_ratio) * advantages).mean()",
            )
        ],
        "why": "A common factor is taken out of the min; but it can be negative.",
        "source": "takuseno/ppo#3",
        "reported": None,
        "test": "test_clipped_loss_has_the_right_value_and_gradient_in_each_region",
    },
    {
        "name": "lander-ratio-always-1",
        "file": LANDER,
        "edits": [
            (
                '        log_probs, batch["old_log_probs"], batch["advantages"], CLIP_EPS',
                '        log_probs, log_probs.detach(), batch["advantages"], CLIP_EPS',
            )
        ],
        "why": "The old probabilities are computed when needed, with the new weights.",
        "source": "tensorforce#312",
        "reported": None,
        "test": "test_the_gradient_of_the_whole_loss_equals_a_plain_rewriting",
    },
    {
        "name": "lander-ratio-without-gradient",
        "file": LANDER,
        "edits": [
            (
                "    ratio = torch.exp(log_probs - old_log_probs)\n",
                "    ratio = torch.exp(log_probs.detach() - old_log_probs)\n",
            )
        ],
        "why": "One detach too many.",
        "source": "common",
        "reported": "flat",
        "test": "test_one_step_makes_a_good_action_likelier_and_a_bad_one_rarer",
    },
    {
        "name": "lander-rewards-not-scaled",
        "file": LANDER,
        "edits": [
            (
                '    rewards = rollout["rewards"] * REWARD_SCALE\n',
                '    rewards = rollout["rewards"]\n',
            )
        ],
        "why": "The environment's numbers are taken as they come.",
        "source": "baselines#627, #766",
        "reported": "flat",
        "test": "test_the_critic_learns_scaled_rewards_and_the_rollout_keeps_the_real_ones",
    },
    {
        "name": "lander-rate-never-falls",
        "file": LANDER,
        "edits": [
            (
                '            optimizer.param_groups[0]["lr"] = rate\n',
                '            optimizer.defaults["lr"] = rate\n',
            )
        ],
        "why": "The optimizer has two places that look like its learning rate.",
        "source": "tianshou#774",
        "reported": None,
        "test": "test_the_rate_falls_in_a_straight_line_to_its_final_share",
    },
    {
        "name": "lander-not-shuffled",
        "file": LANDER,
        "edits": [
            (
                'torch.randperm(len(batch["actions"])).split',
                'torch.arange(len(batch["actions"])).split',
            )
        ],
        "why": "Slices of the batch are minibatches, too.",
        "source": "common",
        "reported": None,
        "test": "test_each_epoch_takes_every_row_once_in_another_order",
    },
    {
        "name": "lander-critic-not-flat",
        "file": LANDER,
        "edits": [
            (
                "nn.Sequential(*network(hidden_units, 1, 1.0), nn.Flatten(0))",
                "network(hidden_units, 1, 1.0)",
            )
        ],
        "why": "A network with one output gives (B, 1), and (B, 1) - (B,) is (B, B).",
        "source": "Spinning Up exercise 2.2, RLinf#1568",
        "reported": "critic blind",
        "test": "test_the_critic_gives_a_flat_vector_so_that_nothing_broadcasts",
    },
    {
        "name": "lander-returns-of-normalised-advantages",
        "file": LANDER,
        "edits": [
            (
                '        "returns": (advantages + values).flatten(),',
                '        "returns": normalise(advantages.flatten()) + values.flatten(),',
            )
        ],
        "why": "Advantages are normalised in place, and only then are the returns made.",
        "source": "common",
        "reported": None,
        "test": "test_the_batch_holds_normalised_advantages_and_returns_that_are_not",
    },
    {
        "name": "lander-entropy-sign",
        "file": LANDER,
        "edits": [
            (
                "value_loss - ENTROPY_BONUS * entropies.mean()",
                "value_loss + ENTROPY_BONUS * entropies.mean()",
            )
        ],
        "why": "All terms of a loss are added, are they not?",
        "source": "pg-is-all-you-need#37, open_spiel#962",
        "reported": "below",
        "test": "test_the_gradient_of_the_whole_loss_equals_a_plain_rewriting",
    },
    # --------------------------------------------------------------------------------
    # Lesson 4: GRPO
    # --------------------------------------------------------------------------------
    {
        "name": "grpo-advantage-sign",
        "file": GRPO,
        "edits": [
            (
                "    centred = rewards - rewards.mean()\n",
                "    centred = rewards.mean() - rewards\n",
            )
        ],
        "why": "'Distance from the mean' has two directions.",
        "source": "common",
        "reported": "falls",
        "test": "test_the_docstring_cases_worked_by_hand",
    },
    {
        "name": "grpo-no-baseline",
        "file": GRPO,
        "edits": [
            (
                "    centred = rewards - rewards.mean()\n",
                "    centred = rewards\n",
            )
        ],
        "why": "The reward model's score is taken for an advantage.",
        "source": "common",
        "reported": None,
        "test": "test_the_docstring_cases_worked_by_hand",
    },
    {
        "name": "grpo-end-not-trained",
        "file": GRPO,
        "edits": [
            (
                "    return (ends.cumsum(1) - ends == 0).long()",
                "    return (ends.cumsum(1) == 0).long()",
            )
        ],
        "why": "The end token is taken for padding, whose number it often shares.",
        "source": "reasoning-from-scratch PR 185, RAGEN#59",
        "reported": "never ends",
        "test": "test_the_mask_ends_after_the_first_end_token_wherever_it_is",
    },
    {
        "name": "grpo-tokens-after-the-end-trained",
        "file": GRPO,
        "edits": [
            (
                "    return (ends.cumsum(1) - ends == 0).long()",
                "    return torch.ones_like(completion_ids)",
            )
        ],
        "why": "Everything that was generated is trained.",
        "source": "common",
        "reported": None,
        "test": "test_the_mask_ends_after_the_first_end_token_wherever_it_is",
    },
    {
        "name": "grpo-logits-one-token-off",
        "file": GRPO,
        "edits": [
            (
                "torch.cat([prompt_ids, completion_ids], 1)[:, :-1]",
                "torch.cat([prompt_ids, completion_ids], 1)",
            )
        ],
        "why": "The logits at place t are about the token at t + 1.",
        "source": "maxtext#2103",
        "reported": None,
        "test": "test_log_probs_equal_a_token_by_token_loop",
    },
    {
        "name": "grpo-temperature-only-in-drawing",
        "file": GRPO,
        "edits": [
            (
                "    logits = logits.float() / temperature if temperature != 1 "
                "else logits.float()\n",
                "    logits = logits.float()\n",
            )
        ],
        "why": "The generation settings belong to generation, it seems.",
        "source": "trl#4159, PR 3029",
        "reported": None,
        "test": "test_the_probabilities_that_are_trained_are_those_that_were_drawn_from",
        "settings": {"TEMPERATURE": 0.7},
    },
    {
        "name": "grpo-greedy-group",
        "file": GRPO,
        "edits": [
            (
                "    tokens = probs.multinomial(2, replacement=True)[:, :1]\n",
                "    return probs.argmax(1, keepdim=True)\n",
            )
        ],
        "why": "The model writes better without chance; but nothing is left to compare.",
        "source": "common",
        "reported": "nothing moves",
        "test": "test_tokens_are_drawn_from_the_whole_vocabulary_or_its_exact_nucleus",
    },
    {
        "name": "grpo-old-is-always-new",
        "file": GRPO,
        "edits": [
            (
                "            if inner_step == 0:  # the policy has not moved",
                "            if True:  # the policy has not moved",
            )
        ],
        "why": "With one gradient step a group it makes no difference, later it does.",
        "source": "tensorforce#312",
        "reported": "ratio 1",
        "test": "test_with_two_inner_steps_the_ratio_leaves_1_and_the_clip_acts",
        "settings": {"INNER_STEPS": 4},
    },
    {
        "name": "grpo-clip-turned-round",
        "file": GRPO,
        "edits": [
            (
                "    objective = torch.min(ratio * advantages, clipped * advantages)\n",
                "    objective = torch.min(ratio, clipped) * advantages\n",
            )
        ],
        "why": "A common factor is taken out of the min; but it can be negative.",
        "source": "takuseno/ppo#3",
        "reported": None,
        "test": "test_the_clip_stops_the_push_only_past_the_edge_that_it_leads_to",
        "settings": {"INNER_STEPS": 4},
    },
    {
        "name": "grpo-k3-turned-round",
        "file": GRPO,
        "edits": [
            (
                "    log_ratio = ref_log_probs - log_probs\n",
                "    log_ratio = log_probs - ref_log_probs\n",
            )
        ],
        "why": "Everywhere else in the script the ratio is new over old.",
        "source": "hands-on-modern-rl#27",
        "reported": None,
        "test": "test_k3_averages_to_the_exact_kl_divergence_over_all_tokens",
        "settings": {"KL_COEF": 0.4},
    },
    {
        "name": "grpo-kl-sign",
        "file": GRPO,
        "edits": [
            (
                "        objective = objective - kl_coef * kl_estimate",
                "        objective = objective + kl_coef * kl_estimate",
            )
        ],
        "why": "Objective or loss? The sign of the penalty depends on it.",
        "source": "ToolRL#52",
        "reported": "falls",
        "test": "test_the_kl_term_is_beta_times_k3_and_pulls_towards_the_reference",
        "settings": {"KL_COEF": 0.4},
    },
    {
        "name": "grpo-reference-is-the-policy",
        "file": GRPO,
        "edits": [
            (
                "    reference = copy.deepcopy(writer) if KL_COEF > 0 else None\n",
                "    reference = writer if KL_COEF > 0 else None\n",
            )
        ],
        "why": "An assignment copies nothing in Python.",
        "source": "trl#2046",
        "reported": "KL 0",
        "test": "test_the_reference_exists_only_with_kl_and_stays_as_it_was",
        "settings": {"KL_COEF": 0.4},
    },
    {
        "name": "grpo-bfloat16-weights",
        "file": GRPO,
        "edits": [
            (
                '        options = {"dtype": torch.float32, ',
                '        options = {"dtype": torch.bfloat16, ',
            )
        ],
        "why": "It halves the memory; but a step of LR is below the weights' resolution.",
        "source": "ml-by-hand PR 85",
        "reported": "nothing moves",
        "test": "test_a_checkpoint_in_bfloat16_is_trained_in_float32",
    },
    {
        "name": "grpo-accumulation-not-divided",
        "file": GRPO,
        "edits": [
            (
                "            accelerator.backward(weight * loss)",
                "            accelerator.backward(loss)",
            )
        ],
        "why": "backward() adds up, the mean over the parts is one's own business.",
        "source": "ms-swift#10117, open-instruct PR 1137",
        "reported": None,
        "test": "test_micro_batches_give_the_update_of_one_batch",
        "settings": {"MICRO_BATCH_SIZE": 2},
    },
    {
        "name": "grpo-zero-grad-between-parts",
        "file": GRPO,
        "edits": [
            (
                "            accelerator.backward(weight * loss)",
                "            optimizer.zero_grad()\n"
                "            accelerator.backward(weight * loss)",
            )
        ],
        "why": "zero_grad before backward is a habit.",
        "source": "torchtitan PR 3575",
        "reported": None,
        "test": "test_micro_batches_give_the_update_of_one_batch",
        "settings": {"MICRO_BATCH_SIZE": 2},
    },
    {
        "name": "grpo-filler-times-0",
        "file": GRPO,
        "edits": [
            (
                "    objective = objective.masked_fill(filler, 0.0)\n",
                "    objective = objective * mask\n",
            ),
            (
                "    log_probs = log_probs.masked_fill(filler, 0.0)\n",
                "",
            ),
        ],
        "why": "Times 0 is 0, except for infinity and NaN.",
        "source": "OpenRLHF PR 1240",
        "reported": "NaN",
        "test": "test_wild_numbers_under_the_mask_do_not_become_nan",
    },
    {
        "name": "grpo-reward-of-one-text",
        "file": GRPO,
        "edits": [
            (
                "            [prompt] * len(responses),\n            responses,\n"
                '            truncation="only_second",\n',
                "            [prompt + response for response in responses],\n"
                "            truncation=True,\n",
            )
        ],
        "why": "The pair is joined as a text, without the marks that it was trained with.",
        "source": "TRL, inputs of the reward model",
        "reported": None,
        "test": "test_the_reward_model_reads_pairs_cut_on_the_response_only",
    },
]

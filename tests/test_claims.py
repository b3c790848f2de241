"""The claims of the demo, each against an independent oracle or a published figure, on real data."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from internals import ascent, baselines, cartpole, games, opposites, policies, regimes, repeats
from internals import demo_data as data
from internals import demo_sums as sums
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_squared_error, r2_score

import jgd

# --- The sum of the gradients of single examples is the gradient of the summed cost.


def by_hand(problem: sums.Problem) -> dict[str, np.ndarray]:
    """The gradient of the summed cost in closed form, in float64 numpy."""
    p, x, y = problem.params, problem.x, problem.y
    if problem.name != "digits":
        prediction = x @ p["w"] + p["b"]
        if problem.name == "breast_cancer":
            prediction = 1 / (1 + np.exp(-prediction))
        return {"w": x.T @ (prediction - y), "b": np.sum(prediction - y)}
    hidden = np.tanh(x @ p["w"] + p["b"])
    logits = hidden @ p["v"] + p["c"]
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    out = probabilities - np.eye(10)[y]
    back = (out @ p["v"].T) * (1 - hidden**2)
    return {"w": x.T @ back, "b": back.sum(0), "v": hidden.T @ out, "c": out.sum(0)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("problem", sums.problems(), ids=lambda problem: problem.name)
def test_the_sum_is_the_gradient_of_the_summed_cost(problem, dtype):
    found = sums.agreement(problem, dtype)
    assert found.worst <= sums.ROUNDING_UNITS
    assert found.largest > 1  # there is a gradient to speak of

    with jax.enable_x64(dtype == "float64"):
        params, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (problem.params, problem.x))
        y = jnp.asarray(problem.y, dtype if problem.name != "digits" else jnp.int32)
        ours = jgd.sum(jgd.per_example_grad(problem.loss)(params, x, y))
        mean = jgd.mean(jgd.per_example_grad(problem.loss)(params, x, y))
    for name, expected in by_hand(problem).items():
        tolerance = {"float32": 1e-5, "float64": 1e-13}[dtype] * found.largest
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            mean[name], expected / len(problem.y), rtol=0, atol=tolerance / len(problem.y)
        )


def test_the_gradients_in_the_plane_add_up_to_the_gradient_of_the_mean():
    each, whole = sums.plane()
    assert each.shape == (422, 2)
    np.testing.assert_allclose(each.mean(axis=0), whole, rtol=1e-4, atol=1e-3)


# --- Three regimes reach the published answer.


def test_the_published_answer_is_that_of_scikit_learn():
    x, y = load_diabetes(return_X_y=True)
    x = x[:, [2]]
    model = LinearRegression().fit(x[:-20], y[:-20])
    assert model.coef_[0] == pytest.approx(regimes.SLOPE, abs=5e-5)
    assert mean_squared_error(y[-20:], model.predict(x[-20:])) == pytest.approx(regimes.TEST_MSE, abs=5e-3)
    assert round(r2_score(y[-20:], model.predict(x[-20:])), 2) == regimes.R2


@pytest.mark.parametrize("regime", regimes.regimes(quick=False), ids=lambda regime: regime.name)
def test_each_regime_reaches_the_published_answer(regime):
    at = regimes.split()
    run = regimes.run(regime, at, jax.random.key(0))
    full = regime.batch_size is None
    assert run.slope[-1] == pytest.approx(regimes.SLOPE, rel=1e-6 if full else 2e-3)
    assert run.test_mse[-1] == pytest.approx(regimes.TEST_MSE, rel=1e-5 if full else 2e-3)
    assert round(run.r2, 2) == regimes.R2

    # The curve's last point, from scikit-learn's formulas on the line that it claims.
    x, y = load_diabetes(return_X_y=True)
    intercept = y[:-20].mean() - run.slope[-1] * x[:-20, 2].mean()
    predicted = run.slope[-1] * x[-20:, 2] + intercept
    assert run.test_mse[-1] == pytest.approx(mean_squared_error(y[-20:], predicted), rel=5e-3)
    assert run.r2 == pytest.approx(r2_score(y[-20:], predicted), abs=5e-3)


def test_a_run_counts_updates_and_examples_and_arrives_to_stay():
    at = regimes.split()
    for regime in regimes.regimes(quick=True):
        run = regimes.run(regime, at, jax.random.key(0))
        size = regime.batch_size or 422
        updates = regime.epochs * -(-422 // size)
        assert len(run.slope) == len(run.seen) == len(run.cost) == updates + 1
        assert run.seen[-1] == regime.epochs * 422
        away = np.abs(run.slope / regimes.SLOPE - 1) > regimes.TOLERANCE
        assert not away[run.arrived :].any()
        assert 0 < run.arrived < updates and run.seconds > 0
        assert (
            away[run.arrived - 1]
            or abs(run.test_mse[run.arrived - 1] / regimes.TEST_MSE - 1) > regimes.TOLERANCE
        )


def test_the_cost_above_its_least_is_what_the_costs_say():
    at = regimes.split()
    path = {"slope": np.array([0.0, 3.0]), "intercept": np.array([0.0, 100.0])}

    def cost(s, i):
        return 0.5 * np.mean((s * at.x + i - at.y) ** 2)

    best = np.polyfit(at.x, at.y, 1)
    expected = [cost(s, i) - cost(*best) for s, i in zip(*path.values(), strict=True)]
    np.testing.assert_allclose(regimes._excess_cost(path, at), expected, rtol=1e-10)


# --- Repeating one example chases it.


def test_repeating_one_example_of_least_squares_projects_onto_it():
    """Steps on one example move along its input, and end where it is predicted exactly: Kaczmarz's "
    "projection."""
    dataset = data.diabetes()
    x, y = (jnp.asarray(a, jnp.float32) for a in (10 * dataset.x[:1], dataset.y[:1]))
    start = jnp.linspace(-5.0, 5.0, 10)
    method = jgd.descent(lambda w, x, y: 0.5 * (x @ w - y) ** 2, optax.sgd(1.0))
    many = jgd.fit(method, start, (x, y), batch_size=1, inner_steps=200, steps=200, key=jax.random.key(0))
    projected = start + (y[0] - x[0] @ start) * x[0] / (x[0] @ x[0])
    np.testing.assert_allclose(many.params, projected, rtol=1e-4, atol=1e-3)


def test_repeating_one_example_lowers_its_loss_and_raises_that_of_the_rest():
    trained = repeats.repeated(1, updates=1000).params
    chased = repeats.chase(trained, examples=8, updates=100)
    own, rest = chased.own.mean(axis=0), chased.rest.mean(axis=0)
    assert own[-1] < 0.5 * own[0] and rest[-1] > rest[0]
    assert np.all(chased.own[:, -1] < chased.own[:, 0])


def test_the_more_repeats_the_worse_after_the_same_number_of_updates():
    once, often = (repeats.repeated(n, updates=1000) for n in (1, 50))
    assert once.loss[0] == pytest.approx(np.log(10), rel=1e-5)  # a classifier that knows nothing
    assert once.loss[-1] < 0.5 < 2 * once.loss[-1] < often.loss[-1]
    assert once.accuracy > 0.85 > often.accuracy


# --- Descent on f is ascent on −f.


@pytest.mark.sample(lambda name: list(opposites.OPTIMIZERS).index(name) % 2 == 0)
@pytest.mark.parametrize("name", opposites.OPTIMIZERS)
def test_descent_and_ascent_walk_the_path_of_bare_optax(name):
    optimizer = opposites.OPTIMIZERS[name]
    walked = opposites.pair(optimizer, steps=50)
    np.testing.assert_allclose(walked.descent, walked.ascent, rtol=0, atol=1e-6)

    x, y = opposites.batch()

    def cost(params):
        return jnp.mean(jax.vmap(sums.logistic_loss, (None, 0, 0))(params, x, y))

    params, transform = opposites.start(), optimizer()
    state = transform.init(params)
    for _ in range(50):
        updates, state = transform.update(jax.grad(cost)(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(walked.ascent[-1], np.append(params["b"], params["w"]), rtol=0, atol=1e-5)
    assert opposites.costs(walked.ascent)[-1] == pytest.approx(float(cost(params)), rel=1e-5)


def test_a_negative_learning_rate_turns_weight_decay_round():
    up = opposites.pair(opposites.OPTIMIZERS[opposites.DECAYED], steps=200).ascent
    trap = opposites.negative_rate(steps=200)

    def length(path):
        return np.linalg.norm(path[-1, 1:])

    assert length(trap) > 1.2 * length(up)


# --- Ascent maximises.


def test_the_score_function_gives_the_gradient_of_the_expected_reward():
    assert ascent.score_identity_error() < 1e-6


def test_ascent_finds_the_best_arm():
    expected = policies.learn_bandit(jax.random.key(3), updates=300)
    assert expected[0] == pytest.approx(policies.ARMS.mean())
    assert expected[-1] > 0.95 * policies.ARMS.max()


def test_the_cart_moves_as_gymnasiums_does():
    gymnasium = pytest.importorskip("gymnasium")
    push, stands = jax.jit(cartpole.push), jax.jit(cartpole.stands)
    rng = np.random.default_rng(0)
    lengths = []
    for seed in range(20):
        env = gymnasium.make("CartPole-v1").unwrapped
        env.reset(seed=seed)
        steps, terminated = 0, False
        while steps < cartpole.MAX_STEPS and not terminated:
            steps += 1
            # A hand that keeps the pole up for a while, so that long episodes are compared too.
            action = (
                int(env.state[2] + 0.5 * env.state[3] > 0)
                if seed % 2 and rng.random() < 0.9
                else int(rng.integers(2))
            )
            before = np.asarray(env.state)
            _, reward, terminated, _, _ = env.step(action)
            np.testing.assert_allclose(
                push(jnp.asarray(before, jnp.float32), action), env.state, rtol=1e-5, atol=1e-6
            )
            assert reward == 1.0
            assert bool(stands(jnp.asarray(env.state, jnp.float32))) is not terminated
        lengths.append(steps)
    assert min(lengths) < 30 and max(lengths) > 100
    assert gymnasium.spec("CartPole-v1").max_episode_steps == cartpole.MAX_STEPS
    assert gymnasium.spec("CartPole-v1").reward_threshold == ascent.SOLVED


def test_an_episode_ends_when_the_pole_falls_and_is_padded():
    def always_right(state):
        return jnp.array([-50.0, 50.0])

    episode = cartpole.play(always_right, jax.random.key(0))
    length = int(episode.alive.sum())
    assert 8 <= length <= 11  # gymnasium's, for a constant push
    assert np.all(episode.alive[:length] == 1) and np.all(episode.alive[length:] == 0)
    assert np.all(episode.actions == 1)
    assert bool(cartpole.stands(episode.states[length - 1]))
    assert not bool(cartpole.stands(cartpole.push(episode.states[length - 1], jnp.asarray(1))))
    assert np.all(np.abs(episode.states[0]) <= cartpole.START_RANGE)


@pytest.mark.slow
@pytest.mark.sample
def test_cartpole_is_solved():
    training = policies.train_cartpole(1)
    assert training.returns[0].mean() < 40  # a policy that knows nothing
    assert training.evaluation.shape == (100,)
    assert training.evaluation.mean() >= ascent.SOLVED


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_cartpole_is_solved_from_other_starts(seed):
    assert policies.train_cartpole(seed).evaluation.mean() >= ascent.SOLVED


def test_the_baseline_of_least_variance_is_its_formula():
    params = policies.first_policy(0)
    episodes = policies.play_many(params, jax.random.key(1), 64)
    scores = jax.vmap(jax.grad(policies.log_likelihood), (None, 0))(params, episodes)
    scores = np.concatenate(
        [np.asarray(s, np.float64).reshape(64, -1) for s in jax.tree.leaves(scores)], axis=1
    )
    returns = np.asarray(policies.returns_of(episodes), np.float64)
    squares = np.sum(scores**2, axis=1)
    expected = np.sum(squares * returns) / np.sum(squares)
    norms = jgd.norms(policies.scores(params, episodes))
    assert policies.least_variance_baseline(norms, policies.returns_of(episodes)) == pytest.approx(
        expected, rel=1e-4
    )

    # At the formula's b the second moment Σ‖s (R − b)‖² is least.
    def moment(b):
        return np.sum(squares * (returns - b) ** 2)

    assert all(moment(expected) < moment(expected + step) for step in (-1, 1))


def test_the_variance_falls_with_the_better_baseline():
    params = policies.first_policy(0)
    found = baselines.gradient_variance(params, jax.random.key(1), episodes=512)
    traces = found.traces
    assert traces["least variance"] < 0.95 * traces["mean return"] < 0.6 * traces["none"]
    lowest = found.grid[np.argmin(found.grid_traces)]
    assert found.baselines["least variance"] == pytest.approx(lowest, rel=0.1)


def test_the_measured_variance_is_that_of_numpy():
    params = policies.first_policy(0)
    found = baselines.gradient_variance(params, jax.random.key(1), episodes=64)
    measured_on = policies.play_many(params, jax.random.fold_in(jax.random.key(1), 1), 64)
    advantage = (policies.returns_of(measured_on) - found.baselines["mean return"]) / policies.RETURN_UNIT
    grads = jax.vmap(jax.grad(policies.reinforce_objective), (None, 0, 0))(params, measured_on, advantage)
    expected = sum(np.var(np.asarray(g, np.float64), axis=0, ddof=1).sum() for g in jax.tree.leaves(grads))
    assert found.traces["mean return"] == pytest.approx(expected, rel=1e-4)


# --- Descent-ascent finds the saddle.


def test_plain_steps_circle_outwards_by_the_formula():
    path = games.play(lambda: optax.sgd(games.RATE), steps=100)
    distance = np.linalg.norm(path, axis=1)
    np.testing.assert_allclose(distance, np.sqrt(2) * (1 + games.RATE**2) ** (np.arange(101) / 2), rtol=1e-4)
    assert np.all(np.diff(distance) > 0)


def test_optimistic_steps_walk_their_recurrence_to_the_saddle():
    steps, rate = 400, games.RATE
    path = games.play(lambda: optax.optimistic_gradient_descent(rate), steps=steps)
    point, last = np.array(games.START), None
    expected = [point]
    for _ in range(steps):
        gradient = np.array([point[1], -point[0]])  # of x·y in x, and of −x·y in y
        last = gradient if last is None else last  # there is nothing to extrapolate from yet
        point, last = point - 2 * rate * gradient + rate * last, gradient
        expected.append(point)
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-4)
    assert np.linalg.norm(path[-1]) < 1e-2

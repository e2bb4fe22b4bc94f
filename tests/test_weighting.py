import math, pickle
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from ader.data import AderError
from ader.weighting import AdaptiveWeight, AnnealedWeight, ConstantWeight

T = lambda v: torch.tensor(v, dtype=torch.double)
losses = st.floats(1e-6, 1e6)
pairs = st.lists(st.tuples(losses, losses), min_size=1, max_size=8)
betas, momenta = st.floats(0.1, 4), st.floats(0.01, 1)

def run(w, steps, dtype=torch.double): return [w(torch.tensor(c, dtype=dtype), torch.tensor(a, dtype=dtype)).item() for c,a in steps]

@settings(max_examples=25)
@given(st.lists(st.tuples(*[st.sampled_from([0., 1e-30, 1e-8, 1e-3, 1., 50., 1e6]) | losses]*2), min_size=1, max_size=8), betas, momenta)
def test_omega_is_a_share(steps, beta, momentum):
    "In float32, as in training, ω stays in [0, 1] for whatever losses, exact and all but exact zeros among them."
    assert all(0 <= o <= 1 for o in run(AdaptiveWeight(beta, momentum), steps, torch.float32))

@given(pairs, betas, momenta)
def test_against_the_equations(steps, beta, momentum):
    "Eqs. 9 and 10 in NumPy."
    L, omega, want = np.array(steps), 0.5, []
    for now in L:
        r = (now/L[0])**beta
        omega += momentum*(r[0]/(r[0]+r[1]) - omega)
        want.append(omega)
    np.testing.assert_allclose(run(AdaptiveWeight(beta, momentum), steps), want, rtol=1e-9, atol=1e-12)

@given(pairs, betas, momenta, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_scale_of_a_loss_does_not_matter(steps, beta, momentum, a, b):
    "Each teacher_loss may be measured in its own unit."
    got = run(AdaptiveWeight(beta, momentum), [(a*c, b*d) for c,d in steps])
    np.testing.assert_allclose(got, run(AdaptiveWeight(beta, momentum), steps), rtol=1e-6, atol=1e-9)

@given(pairs, betas, momenta)
def test_teachers_swapped(steps, beta, momentum):
    "With the lessons exchanged, ω is one minus what it was."
    got = run(AdaptiveWeight(beta, momentum), [(a, c) for c,a in steps])
    np.testing.assert_allclose(got, 1 - np.array(run(AdaptiveWeight(beta, momentum), steps)), atol=1e-9)

@given(st.tuples(losses, losses), st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=5, unique=True), losses, betas, momenta)
def test_more_of_a_lesson_left_more_weight(first, lefts, adv, beta, momentum):
    "At the same step, a larger remaining clean loss never gives a smaller ω, and a larger adversarial one never a larger ω."
    clean = [run(AdaptiveWeight(beta, momentum), [first, (left*first[0], adv)])[-1] for left in sorted(lefts)]
    robust = [run(AdaptiveWeight(beta, momentum), [first, (adv, left*first[1])])[-1] for left in sorted(lefts)]
    assert clean == sorted(clean) and robust == sorted(robust, reverse=True)

@given(pairs, pairs, betas, momenta, st.booleans())
def test_interrupted_and_continued(before, after, beta, momentum, on_disk):
    "Saved and loaded into another object, every later ω is the same; the saved state is not changed by going on."
    w = AdaptiveWeight(beta, momentum)
    run(w, before)
    saved = w.state_dict()
    if on_disk: saved = pickle.loads(pickle.dumps(saved))
    copy = {k: v.clone() for k,v in saved.items()}
    want = run(w, after)
    assert all(torch.equal(saved[k], copy[k]) for k in copy)
    other = AdaptiveWeight(beta, momentum)
    other.load_state_dict(saved)
    assert run(other, after) == want

@given(pairs, pairs, betas, momenta)
def test_reset_forgets(before, after, beta, momentum):
    "After `reset` it is as new."
    w = AdaptiveWeight(beta, momentum)
    run(w, before); w.reset()
    assert run(w, after) == run(AdaptiveWeight(beta, momentum), after)

@pytest.mark.parametrize('w', [AdaptiveWeight(), AdaptiveWeight(momentum=0.1), ConstantWeight(), AnnealedWeight()], ids=repr)
def test_no_gradient_and_no_graph(w):
    "ω is a number to the losses: none of it is differentiated, and no graph of earlier steps is kept."
    for _ in range(2):
        a, b = torch.tensor(2., requires_grad=True), torch.tensor(3., requires_grad=True)
        omega = w(a**2, b**2, 0.5)
        assert not omega.requires_grad and omega.shape == () and omega.dtype == torch.float32
    assert not any(v.requires_grad for v in w.state_dict().values())

@pytest.mark.parametrize('first', [(0., 0.), (0., 2.), (2., 0.)])
def test_a_first_loss_of_zero(first):
    "Nothing to learn has no weight; both nothing is ½; the first loss above 0 becomes the L(0) of that teacher_loss."
    w = AdaptiveWeight()
    assert run(w, [first]) == [{(0., 0.): 0.5, (0., 2.): 0., (2., 0.): 1.}[first]]
    assert run(w, [(4., 2.)]) == [0.5 if first != (2., 0.) else 2/3]
    base = [a or b for a,b in zip(first, (4., 2.))]
    r = np.array([1., 5.])/base
    assert run(w, [(1., 5.)])[0] == pytest.approx(r[0]/r.sum())

def test_a_first_loss_that_is_only_rounding():
    "A student that starts as a copy of its teacher has a first loss like 1e-30 or -1e-9; ω stays a share, also with β=2."
    assert all(0 <= o <= 1 for o in run(AdaptiveWeight(2.), [(1e-30, 1.), (1., 1.), (2., 1.)], torch.float32))
    assert all(0 <= o <= 1 for o in run(AdaptiveWeight(), [(1., 1.), (-1e-9, 1.), (1., -1e-9)], torch.float32))
    assert all(0 <= o <= 1 for o in run(AdaptiveWeight(1.5), [(-1e-9, 1.), (1., 1.), (-1e-9, 1.), (1., 1.)], torch.float32))

@pytest.mark.parametrize('momentum', [1., 0.5])
@pytest.mark.parametrize('bad', [(torch.nan, 1.), (1., torch.nan)])
def test_nan_does_not_stick(momentum, bad):
    "A loss of NaN gives no information, ω moves towards ½, and finite losses afterwards give finite ω. (The method stops anyway.)"
    w = AdaptiveWeight(momentum=momentum)
    run(w, [(1., 1.), (1., 3.)])
    before = w.omega.item()
    assert run(w, [bad]) == [pytest.approx(before + momentum*(0.5 - before))]
    assert 0 <= run(w, [(1., 3.)])[0] <= 1

def test_an_infinite_loss_does_not_stick():
    "After an overflow the next finite losses give a finite ω again."
    w = AdaptiveWeight()
    run(w, [(1., 1.), (torch.inf, 1.)])
    assert run(w, [(1., 3.)]) == [pytest.approx(0.25)]

@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_annealing(start, end, pct):
    "Between its ends, at its ends, half way in the middle, and never turning back."
    w = AnnealedWeight(start, end)
    at = lambda p: w(T(1.), T(2.), p).item()
    assert min(start, end) - 1e-9 <= at(pct) <= max(start, end) + 1e-9
    assert (at(0.), at(0.5), at(1.)) == (pytest.approx(start), pytest.approx((start+end)/2), pytest.approx(end))
    path = np.diff([at(p) for p in np.linspace(0, 1, 9)])*np.sign(end - start)
    assert (path >= -1e-12).all()

@pytest.mark.parametrize('make', [lambda: AdaptiveWeight(0), lambda: AdaptiveWeight(-1), lambda: AdaptiveWeight(math.nan), lambda: AdaptiveWeight(math.inf),
    lambda: AdaptiveWeight(momentum=0), lambda: AdaptiveWeight(momentum=1.1), lambda: AdaptiveWeight(momentum=math.nan),
    lambda: ConstantWeight(-0.1), lambda: ConstantWeight(math.nan), lambda: AnnealedWeight(2, 0), lambda: AnnealedWeight(0, 2)])
def test_bad_settings(make):
    "Refused when made."
    with pytest.raises(AderError): make()

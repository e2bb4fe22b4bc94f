import numpy as np, pytest, torch
from hypothesis import given, strategies as st
from ader.data import AderError
from ader.attention import AttentionOutput
from ader.losses import attention_kl, distillation_loss, soft_kl, teacher_loss

DIRECTIONS = 'T||S', 'S||T'

seeds = st.integers(0, 999)
scales = st.sampled_from([1e-3, 1., 30., 1e4])
directions = st.sampled_from(DIRECTIONS)
normalizations = st.sampled_from(['sum', 'softmax'])

# The references: double precision, loops, nothing taken from the library.
def np_log_softmax(v):
    v = v - v.max()
    return v - np.log(np.exp(v).sum())

def np_kl(log_p, log_q):
    return sum(np.exp(a)*(a - b) for a,b in zip(log_p, log_q))

def np_soft_kl(s, t, tau, direction):
    rows = []
    for a,b in zip(s, t):
        a, b = np_log_softmax(a/tau), np_log_softmax(b/tau)
        rows.append(np_kl(b, a) if direction == 'T||S' else np_kl(a, b))
    return tau**2*np.mean(rows)

def np_pool(m, h, w):
    "Mean over the rows and columns that each cell of the smaller map touches."
    H, W = m.shape
    cell = lambda i, n, N: slice(i*N//n, -(-(i+1)*N//n))
    return np.array([[m[cell(i, h, H), cell(j, w, W)].mean() for j in range(w)] for i in range(h)])

def np_attention_kl(s, t, normalize, tau, direction, tiny):
    h, w = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    rows = []
    for a,b in zip(s[:,0], t[:,0]):
        a, b = (np_pool(m, h, w).ravel() for m in (a, b))
        if normalize == 'softmax': a, b = np_log_softmax(a/tau), np_log_softmax(b/tau)
        else: a, b = (np.log(np.maximum(m, tiny)/np.maximum(m, tiny).sum()) for m in (a, b))
        rows.append(np_kl(a, b) if direction == 'S||T' else np_kl(b, a))
    return np.mean(rows)

def logits(seed, scale, dtype, n=4, k=6):
    "Two batches of logits: scale 1e4 leaves nothing between certainty and zero."
    torch.manual_seed(seed)
    return [(torch.randn(n, k)*scale).clamp(-1e4, 1e4).to(dtype).requires_grad_() for _ in range(2)]

def maps(seed, dtype, edges, sizes=((4,6), (4,6))):
    "Two batches of maps, with exact zeros and ones among the values if `edges`."
    torch.manual_seed(seed)
    out = []
    for h,w in sizes:
        m = torch.rand(3,1,h,w)
        if edges: m = torch.where(torch.rand_like(m) < 0.3, torch.randint(0, 2, m.shape).float(), m)
        out.append(m.to(dtype).requires_grad_())
    return out

def as_np(*ts): return [t.detach().double().numpy() for t in ts]

@given(seeds, scales, st.floats(0.5, 20), directions, st.sampled_from([torch.float32, torch.float64]))
def test_soft_kl(seed, scale, tau, direction, dtype):
    "The value of Eqs. 5 and 6, at any scale, never negative beyond rounding, with finite gradients."
    s, t = logits(seed, scale, dtype)
    loss = soft_kl(s, t, tau, direction)
    want = np_soft_kl(*as_np(s, t), tau, direction)
    tol = 1e-4 if dtype == torch.float32 else 1e-9
    assert loss.shape == () and loss.dtype == dtype
    assert loss.item() == pytest.approx(want, rel=tol, abs=tol*tau**2)
    loss.backward()
    assert s.grad.isfinite().all() and t.grad.isfinite().all()

@given(seeds, st.sampled_from([0., 1e-6, 1e-4, 1e-2]), directions)
def test_soft_kl_is_never_negative(seed, off, direction):
    "A student all but equal to its teacher has a loss of 0 or a little more, but for the rounding of float32."
    torch.manual_seed(seed)
    t = torch.randn(8, 10)*3
    assert soft_kl(t + off*torch.randn_like(t), t, 1., direction).item() >= -1e-6

@given(seeds, directions, normalizations)
def test_attention_kl_is_never_negative(seed, direction, normalize):
    "The same for maps."
    torch.manual_seed(seed)
    m = torch.rand(4,1,8,8)*0.98 + 0.01
    assert attention_kl((m + 1e-6*torch.randn_like(m)).clamp(0, 1), m, normalize, 1., direction).item() >= -1e-6

@given(seeds, scales, st.floats(0.5, 20), directions)
def test_zero_only_where_the_answers_agree(seed, scale, tau, direction):
    "Equal distributions cost nothing, whatever is added to all logits of an image; different ones cost something; no pull at the optimum."
    s, t = logits(seed, scale, torch.float64)
    same = (t.detach() + torch.randn(4,1)*10).requires_grad_()
    loss = soft_kl(same, t, tau, direction)
    assert loss.item() == pytest.approx(0, abs=1e-8*tau**2)
    assert torch.autograd.grad(loss, same)[0].abs().max() < 1e-7*tau**2
    assert soft_kl(s, t, tau, direction).item() > 0

@given(seeds, st.floats(0.5, 20), directions)
def test_temperature_is_division_and_a_factor(seed, tau, direction):
    "τ divides both logits and τ² multiplies the result; for large τ the gradient neither dies nor explodes."
    s, t = logits(seed, 1., torch.float64)
    a, b = soft_kl(s, t, tau, direction), tau**2*soft_kl(s/tau, t/tau, 1., direction)
    assert a.item() == pytest.approx(b.item(), rel=1e-9)
    g = [torch.autograd.grad(soft_kl(s, t, u, direction), s)[0].norm().item() for u in (50., 100.)]
    assert g[0] == pytest.approx(g[1], rel=0.05)

@given(seeds, scales, st.floats(0.5, 20))
def test_directions_are_each_other_s_swap(seed, scale, tau):
    "KL(T‖S) of (s, t) is KL(S‖T) of (t, s), for logits and for maps, and the two directions differ."
    s, t = logits(seed, scale, torch.float64)
    assert soft_kl(s, t, tau, 'T||S').item() == pytest.approx(soft_kl(t, s, tau, 'S||T').item(), rel=1e-12)
    a, b = maps(seed, torch.float64, False)
    for n in 'sum', 'softmax':
        assert attention_kl(a, b, n, tau, 'T||S').item() == pytest.approx(attention_kl(b, a, n, tau, 'S||T').item(), rel=1e-12)
    assert attention_kl(a, b, direction='T||S').item() != pytest.approx(attention_kl(a, b).item(), rel=1e-6)

@given(seeds, directions)
def test_average_is_over_the_batch(seed, direction):
    "Twice the same images is the same loss; the sum over classes is not averaged."
    s, t = logits(seed, 3., torch.float64)
    assert soft_kl(torch.cat([s, s]), torch.cat([t, t]), 1., direction).item() == pytest.approx(soft_kl(s, t, 1., direction).item(), rel=1e-12)
    a, b = maps(seed, torch.float64, False)
    assert attention_kl(torch.cat([a, a]), torch.cat([b, b])).item() == pytest.approx(attention_kl(a, b).item(), rel=1e-12)

@given(seeds, normalizations, st.floats(0.2, 5), directions, st.booleans(), st.sampled_from([torch.float32, torch.float64]),
       st.sampled_from([((4,6), (4,6)), ((8,12), (4,6)), ((4,6), (8,12)), ((8,3), (4,6)), ((5,7), (3,4)), ((1,1), (4,4)), ((2,2), (5,3))]))
def test_attention_kl(seed, normalize, tau, direction, edges, dtype, sizes):
    "Eq. 3 for maps of any two sizes, each size pooled to the smaller, exact zeros and ones included, with finite gradients."
    s, t = maps(seed, dtype, edges, sizes)
    loss = attention_kl(s, t, normalize, tau, direction)
    want = np_attention_kl(*as_np(s, t), normalize, tau, direction, torch.finfo(dtype).tiny)
    tol = 1e-4 if dtype == torch.float32 else 1e-9
    assert loss.shape == () and loss.item() == pytest.approx(want, rel=tol, abs=tol*10)
    loss.backward()
    assert s.grad.isfinite().all() and t.grad.isfinite().all()

@pytest.mark.parametrize('direction', DIRECTIONS)
@pytest.mark.parametrize('normalize', ['sum', 'softmax'])
@pytest.mark.parametrize('values', [(0., 0.), (1., 1.), (0., 1.), (1., 0.), (1e-45, 1e-45), (1e-38, 0.5)])
def test_constant_maps_at_the_edges(values, normalize, direction):
    "A map that is the same everywhere, even all 0, is the uniform distribution: two of them agree, with finite gradients."
    s, t = (torch.full((2,1,4,4), v, requires_grad=True) for v in values)
    loss = attention_kl(s, t, normalize, 1., direction)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and s.grad.isfinite().all()

@given(seeds, directions, normalizations)
def test_a_saturated_block_still_learns(seed, direction, normalize):
    "Through the sigmoid that makes the map, gradients stay finite however sure it is."
    torch.manual_seed(seed)
    raw = (torch.randn(3,1,4,4)*100).requires_grad_()
    attention_kl(raw.sigmoid(), torch.rand(3,1,4,4), normalize, 1., direction).backward()
    assert raw.grad.isfinite().all()

@given(seeds, st.floats(1e-3, 1.), directions)
def test_only_where_counts_with_sum(seed, factor, direction):
    "Divided by the sum, a fainter copy of a map says the same."
    a, b = maps(seed, torch.float64, False)
    assert attention_kl(factor*a, a, 'sum', 1., direction).item() == pytest.approx(0, abs=1e-12)
    assert attention_kl(factor*a, b, 'sum', 1., direction).item() == pytest.approx(attention_kl(a, b, 'sum', 1., direction).item(), rel=1e-9)

@given(seeds, st.floats(0, 1), st.floats(0.5, 5), directions)
def test_distillation_loss(seed, alpha, tau, direction):
    "Eq. 4: labels at one end, teacher at the other, the straight line between."
    s, t = logits(seed, 2., torch.float64)
    y = torch.randint(0, 6, (4,))
    a, b = as_np(s, t)
    ce = -np.mean([np_log_softmax(row)[k] for row,k in zip(a, y.numpy())])
    want = (1-alpha)*ce + alpha*np_soft_kl(a, b, tau, direction)
    assert distillation_loss(s, t, y, alpha, tau, direction).item() == pytest.approx(want, rel=1e-9, abs=1e-12)

@given(seeds, st.floats(0.1, 5), st.floats(0.5, 5), directions, normalizations, st.floats(0.2, 5), directions)
def test_teacher_loss_passes_every_setting_on(seed, weight, tau, direction, att_normalize, att_tau, att_direction):
    "The two terms of Eqs. 5 and 6 with all settings away from their defaults."
    (s, t), (a, b) = logits(seed, 2., torch.float64, n=3), maps(seed, torch.float64, False, ((8,8), (4,4)))
    soft, att = teacher_loss(AttentionOutput(s, a, None), AttentionOutput(t, b, None), weight, tau, direction, att_normalize, att_tau, att_direction)
    assert soft.item() == pytest.approx(np_soft_kl(*as_np(s, t), tau, direction), rel=1e-9)
    assert att.item() == pytest.approx(weight*np_attention_kl(*as_np(a, b), att_normalize, att_tau, att_direction, 0), rel=1e-9)

def test_teacher_loss_without_attention_needs_and_touches_no_maps():
    "With weight 0 the maps are not even looked at, be they missing or of NaN."
    s, t = logits(0, 1., torch.float32)
    for m in None, torch.full((4,1,2,2), torch.nan):
        soft, att = teacher_loss(AttentionOutput(s, m, None), AttentionOutput(t, m, None), attention=0.)
        assert att.item() == 0 and soft.isfinite()

S, M = torch.randn(2,3), torch.rand(2,1,2,2)
@pytest.mark.parametrize('f', [
    lambda: soft_kl(S, torch.randn(2,4)), lambda: soft_kl(S, torch.randn(1,3)), lambda: soft_kl(S, S, 1., 'KL'), lambda: attention_kl(M, M, 'none'),
    lambda: attention_kl(M, M, direction='st'), lambda: distillation_loss(S, S, torch.tensor([0,1]), 1.1), lambda: distillation_loss(S, S, torch.tensor([0,1]), -0.1),
    lambda: teacher_loss(AttentionOutput(S, None, None), AttentionOutput(S, M, None)), lambda: teacher_loss(AttentionOutput(S, M, None), AttentionOutput(S, None, None))])
def test_bad_input(f):
    "Refused with one sentence."
    with pytest.raises(AderError) as e: f()
    assert '\n' not in str(e.value)

@pytest.mark.parametrize('f', [lambda t: soft_kl(S, S, t), lambda t: attention_kl(M, M, 'softmax', t)])
@pytest.mark.parametrize('tau', [0., -1., float('nan')])
def test_temperature_must_be_above_0(f, tau):
    "A temperature of 0 gives NaN and a negative one turns the distribution over; both are refused."
    with pytest.raises(AderError): f(tau)

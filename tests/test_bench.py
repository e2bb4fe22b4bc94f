"The benchmark on few images, and what it says of goals."
import json, math, pytest
from ader import bench
from ader.bench import ader_bench, goals, _bench_accuracy, _bench_autoattack, _minutes_until
from ader.data import AderError


def test_time_to_accuracy():
    "Each way ends after the epoch in which its minutes are over."
    d = _bench_accuracy(1e-6, 'digits', rounds=1)
    assert {k: len(v['epochs']) for k,v in d['ways'].items()} == {f'{k} steps': 1 for k in (2, 3, 10)}
    assert all(0 <= e['clean'] <= 1 and e['minutes'] > 0 for v in d['ways'].values() for e in v['epochs'])
    assert json.loads(json.dumps(d)) == d and d['seconds_a_step'].keys() == {'plain', 'ours'}

def ways(steps, first): # accuracies of 40 % and 20 %, then of 60 % and 30 %
    rows = [{'minutes': first, 'clean': 0.4, 'pgd-10': 0.2}, {'minutes': 2*first, 'clean': 0.6, 'pgd-10': 0.3}]
    return {f'{steps} steps': dict(epochs=rows)}

def test_minutes_until():
    d = dict(ways=ways(2, 1.) | ways(10, 4.), seconds_a_step=dict(plain=[3., 3., 9.], ours=[1., 1., 1.]))
    got = _minutes_until(d, 0.5, 0.3)
    assert got == {'ours, 2 steps': 2., 'ours, 10 steps': 8., 'plain loop, 10 steps': 24.}
    assert _minutes_until(d, 0.4, 0.2)['ours, 10 steps'] == 4 and _minutes_until(d, 0.7, 0.1)['ours, 2 steps'] == math.inf
    t = goals(dict(accuracy=d, demo=100., autoattack=[dict(library='ader', ratio=1.), dict(library='pyautoattack', ratio=2.5)]))
    assert t.measured['ader_demo: 75 s over its time'] == 0.75 and t.loc[t.index.str.startswith('AutoAttack')].iloc[0, -1] == 'reached'
    assert (t[t.index.str.startswith('SAT')].measured == 12).all()

def test_autoattack_beside_the_package(monkeypatch):
    "Each is timed, and says how many images its own attack leaves."
    monkeypatch.setattr(bench, 'AutoAttack', lambda threat: bench.PGD_sat(threat, 1))
    monkeypatch.setattr('pyautoattack.AutoAttack.run_standard_evaluation', lambda self, x, y, batch_size: (x, y))
    ours, theirs = _bench_autoattack(1, 20)
    assert ours['library'] == 'ader' and ours['ratio'] == 1 and theirs['accuracy'] > ours['accuracy']

@pytest.mark.parametrize('kw,match', [(dict(parts='train,tain'), "not 'tain'"), (dict(rounds=2), 'at least 3')])
def test_wrong_input(kw, match, tmp_path):
    with pytest.raises(AderError, match=match): ader_bench(tmp_path/'out', **kw)
    assert not list(tmp_path.iterdir())

"Runs, records, leases and tables: killed processes, several processes, damaged files."
import copy, json, multiprocessing, random, shutil, time
from pathlib import Path
import pytest, torch
from hypothesis import given, settings, strategies as st
from ader.data import AderError
from ader.reproduce import in_order, one_cycle, plan, read_records, runs, step_schedule
from ader.cli import ader_reproduce_cli

FEW = dict(PGD_sat=dict(images=40))
QUIET = dict(say=lambda s: None, poll=0.2)


def tiny(method='Natural', epochs=1, **kwargs): return a_run(method, 'small_resnet:width=4', schedule=one_cycle(epochs, 1e-2, 100), evaluate=FEW, **kwargs)


def process(f, *args):
    "A process of its own that calls `f`; forked, as importing takes seconds."
    p = multiprocessing.get_context('fork').Process(target=f, args=args, daemon=True)
    p.start()
    return p


def until_true(f, seconds=60):
    end = time.time() + seconds
    while not f():
        assert time.time() < end, 'it did not happen in time'
        time.sleep(0.02)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A folder with one finished run, and its record."
    folder = tmp_path_factory.mktemp('runs')
    return folder, do(tiny(), folder, **QUIET)


def test_killed_and_continued_gives_the_same_record(tmp_path):
    run = tiny('SAT', epochs=4)
    p = process(do, run, tmp_path/'killed')
    until_true(lambda: list((tmp_path/'killed').rglob('net-0002.ckpt')))
    p.kill(), p.join()
    assert list((tmp_path/'killed'/'leases').glob('*.lease')) and not list((tmp_path/'killed').rglob('*.safetensors'))
    said = []
    a, b = do(run, tmp_path/'killed', say=said.append, poll=0.2), do(run, tmp_path/'whole', **QUIET)
    times = lambda rows: [{k: v for k,v in o.items() if k not in ('seconds', 'epoch')} for o in rows]
    assert times(a['robustness']) == times(b['robustness']) and a['weights'] == b['weights'] and a['epochs'] == b['epochs']
    assert not list((tmp_path/'killed').rglob('*.ckpt')) and not list((tmp_path/'killed').rglob('*.lease'))


def test_out_of_time_keeps_what_is_done(tmp_path):
    run, pieces = tiny('SAT', epochs=2), 0
    while True:
        pieces += 1
        try: r = do(run, tmp_path, until=time.time() + 0.7*pieces, **QUIET)
        except OutOfTime: assert pieces < 30
        else: break
    assert pieces > 1 and len(r['epochs']) == 2 and r['weights'] == do(run, tmp_path.with_name('whole'), **QUIET)['weights']


def count(folder, n):
    "Add 1 to the number in a file `n` times, reading and writing apart."
    while n:
        with Lease(folder/'leases', 'count', 0.05, 20) as l:
            if l.take():
                c = int((folder/'count').read_text())
                time.sleep(0.002)
                (folder/'new').write_text(str(c + 1)), (folder/'new').replace(folder/'count')
                n -= 1
        time.sleep(random.uniform(0, 0.004))

def hold(folder):
    l = Lease(folder/'leases', 'count', 0.05, 20)
    while not l.take(): time.sleep(0.001)
    (folder/'held').touch()
    time.sleep(60)

def test_one_holder_at_a_time_even_when_a_holder_is_killed(tmp_path):
    (tmp_path/'count').write_text('0')
    many = [process(count, tmp_path, 30) for _ in range(4)]
    holder = process(hold, tmp_path)
    until_true((tmp_path/'held').exists)
    before = (tmp_path/'count').read_text()
    time.sleep(0.3)
    assert (tmp_path/'count').read_text() == before # nobody else while it lives
    holder.kill(), holder.join()
    for p in many: p.join(60)
    assert [p.exitcode for p in many] == [0]*4
    assert (tmp_path/'count').read_text() == '120' and not list((tmp_path/'leases').iterdir())


def test_processes_share_the_work(tmp_path):
    todo = [tiny(seed=i) for i in range(4)]
    def worker(i): work(todo, tmp_path, poll=0.2, say=lambda l: print(l, file=open(tmp_path/f'{i}.log', 'a')))
    ps = [process(worker, i) for i in range(3)]
    for p in ps: p.join(100)
    assert [p.exitcode for p in ps] == [0]*3
    assert sum(f.read_text().count(': training\n') for f in tmp_path.glob('*.log')) == 4 and {r['run']['seed'] for r in read_records(tmp_path/'results').values()} == {0, 1, 2, 3}


def test_a_failing_run_stops_only_those_that_need_it(tmp_path):
    bad = a_run('TRADES', 'small_resnet:width=4', schedule=step_schedule(1, 1e30, [], bs=100), evaluate={})
    student = tiny('RSLAD', teachers=dict(robust=bad))
    failed = work([student, tiny()], tmp_path, **QUIET)
    assert 'loss of TRADES became' in failed[run_name(bad)] and 'what it needs failed' in failed[run_name(student)]
    assert [r['run']['method'] for r in read_records(tmp_path/'results').values()] == ['Natural']
    with pytest.raises(AderError, match='what it needs failed'): do(student, tmp_path, **QUIET)


def test_a_record_without_its_network(done, tmp_path):
    "Records are committed, networks are not: what is on record is not done again, unless a student needs the network."
    folder, r = done
    assert wanted([r['run']], tmp_path, folder/'results') == []
    robust = tiny('TRADES')
    do(robust, tmp_path/'a', tmp_path/'results', **QUIET)
    student = tiny('RSLAD', teachers=dict(robust=robust))
    assert [o['method'] for o in wanted([student], tmp_path/'b', tmp_path/'results')] == ['TRADES', 'RSLAD']
    do(student, tmp_path/'b', tmp_path/'results', **QUIET)
    assert wanted([student], tmp_path/'b', tmp_path/'results') == []


def test_what_a_record_answers(done):
    _, r = done
    more = lambda **e: dict(r['run'], evaluate=e)
    assert answers(r, r['run']) and answers(r, more()) and not answers(None, r['run'])
    assert not answers(r, more(FGSM={})) and not answers(r, more(PGD_sat={})) and not answers(r, more(PGD_sat=dict(images=50)))


@settings(max_examples=150)
@given(st.data())
def test_whatever_is_changed_in_a_record_is_noticed_or_harmless(done, data):
    "Any field removed or replaced: an AderError, never another error."
    r = copy.deepcopy(done[1])
    at, key = r, data.draw(st.sampled_from(sorted(r)))
    while isinstance(at[key], (dict, list)) and at[key] and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else data.draw(st.integers(0, len(at) - 1))
    if data.draw(st.booleans()): del at[key]
    else: at[key] = data.draw(st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)))
    try: check_record(r)
    except AderError: pass


def test_damaged_files_are_refused(done, tmp_path):
    r = done[1]
    for i,text in enumerate(['', '{', '[]', json.dumps(dict(r, ader_run=2)), json.dumps(dict(r, id='0'*10)), json.dumps(dict(r, robustness=[]))]):
        (tmp_path/f'{i}.json').write_text(text)
        with pytest.raises(AderError, match=f'{i}.json'): read_record(tmp_path/f'{i}.json')
    with pytest.raises(AderError): read_records(tmp_path)


def test_pieces_cannot_leave_the_folder(done, tmp_path):
    listed = pack(done[0], tmp_path/'pieces', 1000)
    (tmp_path/'pieces'/'pieces.json').write_text(json.dumps({'../outside': next(iter(listed.values()))}))
    with pytest.raises(AderError, match='outside'): unpack(tmp_path/'pieces', tmp_path/'to')
    assert not (tmp_path/'outside').exists() and not (tmp_path/'to').exists()


def test_seeds_and_teachers():
    a, b = plan('table2', 'digits', seeds=(0, 1), only=['ADER']), plan('table2', 'laptop', seeds=(0, 1), only=['ADER'])
    assert [r['teachers']['clean']['seed'] for *_,r in a] == [0, 1] and [r['teachers']['clean']['seed'] for *_,r in b] == [0, 0] # teachers are dear at laptop scale
    assert len({run_id(o) for o in runs('table2', 'laptop', seeds=(0, 1), only=['ADER'])}) == 4
    merged = in_order(runs('table2') + runs('table6'))
    assert {'FGSM', 'Square', 'transfer-CW_inf'} <= set(next(r for r in merged if r['method'] == 'ADER')['evaluate'])


def test_a_table_says_data_and_scale(done):
    run = plan('table2', 'digits', only=['Natural'])[0][-1]
    r = dict(copy.deepcopy(done[1]), run=run, file='somewhere/a.json')
    text = as_markdown('table2', 'digits', {run_id(run): r}, only=['Natural'], link=lambda f: 'link/' + f)
    for o in ("scikit-learn's digits, NOT the experiment of the paper", 'Data: digits', '94.57', 'far above', 'between seeds where there are several', '](link/somewhere/a.json)', f'{100*r["robustness"][0]["accuracy"]:.2f} ±'): assert o in text


def test_dry_run_trains_nothing(tmp_path, capsys):
    ader_reproduce_cli(['table2', '--dry-run', '--only', 'RSLAD', '--epochs', '1', '--folder', str(tmp_path/'a'), '--results', str(tmp_path/'b')])
    out = capsys.readouterr().out
    assert 'to be trained' in out and '2 runs, 0 done' in out and not list(tmp_path.rglob('*.json'))


def test_who_slept_through_a_takeover_leaves_the_next_holder_alone(tmp_path):
    a, b = Lease(tmp_path, 'x', 0.02, 0.2), Lease(tmp_path, 'x', 5, 60)
    assert a.take()
    a.mine.unlink() # taken over, done and released while it slept ...
    assert b.take() and b.mine == a.mine # ... and taken again
    until_true(lambda: a.lost)
    a.release()
    assert b.is_mine() and b.mine.exists()
    b.release()


def test_a_teacher_that_students_of_several_seeds_share_counts_once(done):
    run = next(r for _,defense,r in plan('table1', 'laptop') if defense == 'Clean teacher')
    r = dict(done[1], id=run_id(run), name=run_name(run), run=run)
    one, three = (draw('table1', 'laptop', {run_id(run): r}, only=['Clean teacher'], seeds=s) for s in ((0,), (0, 1, 2)))
    assert one.equals(three) and '± 0.00' not in one.iloc[0, -2] # the interval of one network, and not the spread of a network with itself


def test_how_names_every_number_of_images():
    "An attack that some records judged on fewer images than others is named with both numbers; a table of teachers has no students."
    a = next(r for r in read_records(Path(__file__).parent.parent/'results').values() if not r['run']['teachers'])
    b = copy.deepcopy(a)
    b['robustness'][0]['images'] = 7
    first, n = a['robustness'][0]['attack'], a['robustness'][0]['images']
    assert f'{n:,} for {first}' in how([a, b]) and f'7 for {first}' in how([a, b])
    assert 'Networks: ' in how([a]) and 'teachers' not in how([a])


def test_the_worst_case_is_that_of_attacks_on_the_network_itself(done, tmp_path, monkeypatch):
    "Not of what another network's attack does to it; and an evaluation took as long as its attacks."
    folder = shutil.copytree(done[0], tmp_path/'runs')
    right = dict(clean=torch.arange(500) > 0, FGSM=torch.arange(500) > 4, PGD_sat=torch.arange(500) > 9)
    right['transfer-PGD_sat'] = torch.arange(500) > 99
    monkeypatch.setattr('ader.reproduce.as_attack', lambda name, *args: name)
    monkeypatch.setattr('ader.reproduce.robust_mask', lambda net, batches, attack='clean', *args, **kwargs: (right[attack], dict(seconds=1., forward=0, backward=0)))
    r = do(tiny() | dict(evaluate={k: dict(images=None) for k in right if k != 'clean'}), folder, **QUIET)
    fooled = {o['attack']: round(500*(1 - o['accuracy'])) for o in r['robustness']}
    assert fooled == {'clean': 1, 'FGSM': 5, 'PGD_sat': 10, 'transfer-PGD_sat': 100, 'worst case': 10} and r['seconds']['evaluation'] == 4

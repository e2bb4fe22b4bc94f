"Runs as data, records, what is still to be done, killed and continued, in a pool of processes and on Ray."
import json, os, pytest, signal, sys
from pathlib import Path
from dataclasses import asdict, replace
from ader import reproduce
from ader.data import AderError
from ader.samples import sample_net
from ader.reproduce import (SCALES, TABLES, Record, Run, ader_reproduce, load_net, make_table,
                            one_cycle, plan, read_records, run_all, run_one, runs, step_schedule,
                            table_markdown, _in_order, _pending, _tables)
from ader.training import PrintEpochs

FEW = {a: dict(images=40) for a in ('FGSM', 'PGD_sat')}
ALL = ['clean', 'FGSM', 'PGD_sat', 'transfer-PGD_sat'] # measured of a student
SHORT = dict(schedule=one_cycle(1, 1e-2), evaluate=FEW)

def student(**more):
    "A student of one epoch with two teachers."
    settings = dict(steps=2)
    clean, robust = (Run(m, 'small_resnet:width=4', settings=settings, **SHORT) for m in ('Natural', 'TRADES'))
    teachers = dict(clean=clean, robust=robust)
    evaluate = FEW | {'transfer-PGD_sat': dict(images=40, surrogate=robust)}
    more = SHORT | dict(evaluate=evaluate) | more
    return Run('ADER', 'small_resnet:width=4', teachers=teachers, settings=settings, **more)

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A folder in which two processes train and evaluate the student and its teachers."
    folder = tmp_path_factory.mktemp('runs')
    assert run_all([student()], folder, workers=2) == {}
    return folder

# ---- runs

def test_a_run_survives_json():
    r = student(evaluate=FEW | {'transfer-PGD_sat': dict(surrogate=student().teachers['robust'])})
    again = Run(**json.loads(json.dumps(asdict(r))))
    assert again == r and asdict(again) == asdict(r)
    assert [o.method for o in r.needs] == ['Natural', 'TRADES', 'TRADES']

@pytest.mark.parametrize('change', [dict(seed=1), dict(settings={}), dict(eps=0.1), dict(net='small_resnet'),
                                    dict(attention=False), dict(schedule=one_cycle(2, 1e-2))], ids=str)
def test_what_decides_changes_the_id(change):
    assert replace(student(), **change).id != student().id

def test_what_decides_nothing_does_not():
    r = student()
    assert replace(r, evaluate={}, scale='other').id == r.id
    other = replace(r, teachers={k: replace(t, scale='x') for k,t in r.teachers.items()})
    assert other.id == r.id

@pytest.mark.parametrize('kw,match', [
    (dict(method='Magic'), 'method must be one of'), (dict(method='ADER'), 'needs a clean teacher'),
    (dict(method='SAT', settings=dict(omega=1)), "SAT has no setting 'omega'"),
    (dict(method='SAT', evaluate=dict(PGD={})), "an attack is one of FGSM, .*, not 'PGD'")])
def test_a_run_that_can_not_be(kw, match):
    with pytest.raises(AderError, match=match): Run(net='small_resnet', **kw)

def test_order_and_merging():
    a, b = student(evaluate=dict(FGSM={})), student(evaluate=dict(CW_inf={}))
    got = _in_order([a, b])
    assert [o.method for o in got] == ['Natural', 'TRADES', 'ADER']
    assert set(got[-1].evaluate) == {'FGSM', 'CW_inf'}

# ---- records

def test_a_record_says_everything(done):
    r = read_records(done)[student().id]
    assert [o['attack'] for o in r.robustness] == ALL and len(r.epochs) == 1
    assert r.source == dict(data='digits', training=1000, validation=297, test=500)
    assert r['clean']['images'] == 500 and r['FGSM']['images'] == 40 and r['none'] is None
    assert len(r.checks) >= 8 and set(r.code) >= {'version'} and r.config['method'] == 'ADER'

def test_what_is_no_record_is_refused(done, tmp_path):
    f = done/'results'/f'{student().name}.json'
    d = json.loads(f.read_text())
    for bad in (dict(d, more=1), {k: v for k,v in d.items() if k != 'epochs'}, dict(d, run={})):
        (tmp_path/f.name).write_text(json.dumps(bad))
        with pytest.raises(AderError, match='no record of a run'): Record.read(tmp_path/f.name)
    changed = dict(d, run=dict(d['run'], seed=1))
    (tmp_path/f.name).write_text(json.dumps(changed))
    with pytest.raises(AderError, match='is the record of'): Record.read(tmp_path/f.name)

def test_the_committed_records_are_those_of_the_tables():
    records = read_records('results')
    assert sum(r.id in records for *_,r in plan('table2', 'laptop')) == len(plan('table2', 'laptop'))
    assert all(r.id in records for *_,r in plan('table2', 'digits', (0, 1, 2)))

# ---- what is to be done

def test_nothing_is_done_twice(done, monkeypatch):
    assert _pending([student()], done, done/'results') == []
    monkeypatch.setattr(reproduce, 'train', None)
    more = run_one(replace(student(), evaluate=dict(CW_inf=dict(images=40))), done)
    assert [o['attack'] for o in more.robustness] == [*ALL[:3], 'CW_inf', ALL[3]]

def test_more_images_are_to_be_done(done):
    r = student(evaluate=dict(FGSM=dict(images=60)))
    assert _pending([r], done, done/'results') == [r]

def test_a_failed_teacher_fails_its_students_alone(tmp_path, monkeypatch):
    def broken(run, *rest):
        raise AderError(f'{run.method} is broken')
    monkeypatch.setattr(reproduce, 'run_one', broken)
    why = run_all([student()], tmp_path)
    assert sorted(why.values()) == ['Natural is broken', 'TRADES is broken', 'what it needs failed']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='it forks')
def test_killed_and_continued(tmp_path):
    "Killed while it trains, the same call continues from the checkpoint and ends with the same network."
    run = replace(student().teachers['clean'], schedule=one_cycle(3, 1e-2))
    if not (pid := os.fork()):
        old = PrintEpochs.before_train
        def before_train(self):
            old(self)
            if self.epoch == 2: os.kill(os.getpid(), signal.SIGKILL)
        PrintEpochs.before_train = before_train
        try: run_one(run, tmp_path/'a')
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert len(list((tmp_path/'a').rglob('*.ckpt'))) == 2
    a, b = run_one(run, tmp_path/'a'), run_one(run, tmp_path/'b')
    assert a.weights == b.weights and a.epochs == b.epochs
    assert not list((tmp_path/'a').rglob('*.ckpt'))

# ---- side by side

def test_a_pool_of_processes_does_what_one_does(done, tmp_path):
    assert run_all([student()], tmp_path) == {}
    a, b = (read_records(o)[student().id] for o in (done, tmp_path))
    assert a.weights == b.weights

def test_ray(done, tmp_path):
    "On a Ray cluster of this machine, and without Ray a sentence."
    ray = pytest.importorskip('ray')
    ray.init(num_cpus=1, include_dashboard=False) # a second process would import everything again
    try: assert run_all([student()], tmp_path, ray='local') == {}
    finally: ray.shutdown()
    assert read_records(tmp_path)[student().id].weights == read_records(done)[student().id].weights

def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(AderError, match=r'ader-distill\[ray\]'):
        run_all([student()], tmp_path, ray='auto')

# ---- tables and commands

@pytest.mark.parametrize('scale', SCALES)
def test_every_table_has_its_runs(scale):
    for t in _tables('all', scale):
        todo = runs(t, scale)
        assert todo and all(n.id in {o.id for o in todo} for r in todo for n in r.needs)

def test_shorter_schedules():
    *_,run = plan('table2', 'paper', epochs=30)[-1]
    assert run.schedule['drops'] == [21.5, 26, 28.5]
    assert plan('table2', 'paper')[-1][-1].schedule == step_schedule(300, 0.1, [215, 260, 285])

def test_a_table_from_records_alone():
    records = read_records('results')
    d = make_table('table2', 'laptop', records)
    row = d[d.defense == 'SAT'].iloc[0]
    run = next(r for _,name,r in plan('table2', 'laptop') if name == 'SAT')
    assert row['PGD_sat'].strip('*').startswith(f'{100*records[run.id]["PGD_sat"]["accuracy"]:.1f} ±')
    assert all(d[a].str.contains(r'\*\*').sum() == 1 for a in d.columns[1:]), 'one best of each'
    text = table_markdown('table2', 'laptop', records)
    assert 'NOT the experiment of the paper' in text and run.name in text and "paper's numbers" in text
    assert 'no records' in table_markdown('table2', 'paper', records)

@pytest.mark.parametrize('kw,match', [
    (dict(table='table8'), 'table is one of table1'), (dict(scale='huge'), 'scale is one of paper'),
    (dict(only='ADR'), "not 'ADR'"), (dict(seeds='x'), '--seeds is like'), (dict(seeds='-1'), "'-1'"),
    (dict(epochs=0), 'at least 1'), (dict(table='front'), 'front is not for the scale'),
    (dict(table='table2', scale='front'), 'is one of front')])
def test_wrong_input(kw, match, tmp_path):
    with pytest.raises(AderError, match=match):
        ader_reproduce(**(dict(table='table2', folder=tmp_path/'a', results=tmp_path/'b') | kw))
    assert not list(tmp_path.iterdir())

def test_dry_run_trains_nothing(tmp_path, capsys):
    ader_reproduce('table2', only='Natural', dry_run=True, folder=tmp_path/'a', results=tmp_path/'b')
    assert '1 runs, 0 done' in capsys.readouterr().out and not list(tmp_path.rglob('*.json'))

def test_the_committed_networks_are_those_that_a_page_asks():
    "Notebook 10: the students of Fig. 4 and their teachers, unless they are among the package's samples; all results stay small."
    root, samples = Path(__file__).parent.parent/'results', [sample_net(o).metadata['run'] for o in ('clean', 'robust', 'student')]
    table2 = {k: run for _,k,run in plan('table2', 'laptop')}
    students = [r for *_,r in plan('fig4', 'laptop')]
    asked = {r.name for r in [*students, *table2['ADER'].teachers.values()]}
    assert {f.parent.name for f in (root/'nets').glob('*/net.safetensors')} == asked - {*samples}
    assert sum(f.stat().st_size for f in root.rglob('*') if f.is_file()) < 12e6

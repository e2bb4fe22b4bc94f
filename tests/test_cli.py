"The commands as their users run them: files, tables, exit codes."
import base64, io, json, re
from multiprocessing import get_context
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from ader import cli
from ader.attacks import Threat, paper_attacks
from ader.checkpoints import load, save
from ader.data import AderError, digits, load_data
from ader.evaluation import evaluate
from ader.networks import small_resnet


def run(command, *argv):
    "The exit code of a command."
    try: return cli.command([command, *map(str, argv)]) or 0
    except SystemExit as e: return e.code


# Every command

COMMANDS = ['demo', 'fit', 'teach', 'distill', 'evaluate', 'export', 'reproduce', 'table', 'bench']

@pytest.mark.parametrize('name', COMMANDS)
def test_help(name, capsys):
    "Each option has a sentence; numbers have units or defaults."
    assert run(f'ader_{name}', '--help') == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert out.startswith(f'usage: ader_{name}') and '(default:' in out
    if '--eps' in out: assert 'pixels in [0, 1]' in out

MISUSE = '''
demo --eps 0 | above 0
demo --eps nan | ε
demo --eps 8 | did you mean 8/255
demo --epochs 0 | at least 1 epoch
demo --seed -1 | --seed must not be negative
demo --workers -1 | --workers
demo --out /proc/ader | can't write to the folder
demo --eps much | invalid float
demo --nonsense | unrecognized
teach --method mart | --method is one of natural, trades, sat
teach --net resnet1 | resnet1
teach --net small_resnet:8 | small_resnet:width=32
teach --net small_resnet:in_channels=3 | images
teach --data nowhere | a folder of images, not
teach --eps 1/0 | ε
teach --lr 0 | learning rate
teach --bs 0 | bs must be a whole number from 1
teach --images -1 | --images
teach --precision half | float32
teach --size 64 | are for folders
distill --method RSLAD | needs a robust teacher
distill --method RSLED | RSLED
distill --clean nobody.json | there is no file
evaluate | required
evaluate nobody.json | there is no file
evaluate net --eps 8 | did you mean 8/255
evaluate net --norm L1 | norm
evaluate net --queries -1 | --queries
evaluate net --precision half | float32
evaluate . | must hold one saved network
teach --method sat:steps=0 | steps must be a whole number
teach --method sat:beta=2 | SAT has no setting 'beta'
teach --method sat:2 | small_resnet:width=32
teach --method trades:beta=much | trades:beta=much
teach --method sat:threat=8 | sat:threat=8
'''.strip().splitlines()
MISUSE += [f'{o} {300*"a"} | too long' for o in ('evaluate', 'export', 'fit', 'teach --data', 'distill --clean')]

def test_a_command_that_there_is_not():
    with pytest.raises(AderError, match="command must be one of 'ader_demo', .*, got 'json'"): cli.command('json --x')

def test_a_method_with_settings():
    "Those of its text win; the others are options of the command."
    m = cli._maker('aderplus:labels=0.5,joint=True,attention=none', *[small_resnet(width=4)]*2)(compile=True)
    assert (type(m).__name__, m.labels, m.joint, m.attention, m.compile) == ('ADERPlus', 0.5, True, 'none', True)
    assert cli._maker('SAT:steps=2')(precision='float32').steps == 2 and cli._maker('SAT')().steps == 10

@pytest.mark.parametrize('case', MISUSE)
def test_misuse_is_one_line_and_exit_code_2(case, capsys, tmp_path, monkeypatch):
    argv, says = case.split(' | ')
    name, *argv = argv.split()
    monkeypatch.chdir(tmp_path)
    save(small_resnet(width=4), 'net/net')
    before = {o for o in tmp_path.rglob('*') if o.is_file()}
    assert run(f'ader_{name}', *argv) == 2
    out, err = capsys.readouterr()
    assert err.count('\n') == 1 and err.startswith(f'ader_{name}: ') and says in err
    assert {o for o in tmp_path.rglob('*') if o.is_file()} == before

def test_hyphens_are_underscores_and_errors_are_one_line(capsys):
    def dry(
        name:str, # of something
        dry_run:bool=False # do nothing
    ):
        "Try it."
        if not dry_run: raise AderError('two\nlines')
        print(name)
    for o in ('--dry-run', '--dry_run'): cli._as_command(dry, ['a-b', o])
    with pytest.raises(SystemExit) as e: cli._as_command(dry, ['x'])
    assert e.value.code == 2 and capsys.readouterr() == ('a-b\n'*2, 'dry: two lines\n')


# ader_demo, with two of its students

@pytest.fixture(scope='module')
def demo(tmp_path_factory, few_digits):
    "Of fewer digits than there are."
    out = tmp_path_factory.mktemp('demo')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(cli, '_STUDENTS', ('Natural', 'ADER'))
        m.setattr(cli, 'digits', few_digits)
        cli.ader_demo(out, seed=3, quick=True)
    return out

def test_what_the_demo_writes(demo):
    files = ['record.json', 'report.html', 'student.json', 'student.safetensors']
    assert sorted(o.name for o in demo.iterdir()) == files
    page = (demo/'report.html').read_text()
    shown = [base64.b64decode(s) for s in re.findall(r'src="data:image/png;base64,([^"]*)"', page)]
    assert len(shown) == 3 and all(Image.open(io.BytesIO(o)).format == 'PNG' for o in shown)
    assert not re.search(r'href=|<script|url\(', page)
    r = json.loads((demo/'record.json').read_text())
    for o in r['results']:
        assert f'{100*o["accuracy"]:.1f} ± {50*(o["high"] - o["low"]):.1f}' in page
    assert {o['network'] for o in r['results']} == {'natural teacher', 'robust teacher', 'Natural', 'ADER'}
    assert (r['seed'], r['evaluated']) == (3, '100 test images')

def test_the_saved_student_is_the_one_in_the_table(demo):
    results = json.loads((demo/'record.json').read_text())['results']
    d = pd.DataFrame(results).query("network == 'ADER'")
    test, attacks = digits(device='cpu').test, paper_attacks(Threat(0.2))
    got = evaluate(load(demo/'student'), test, attacks, images=100, seed=3, progress=False,
                   precision='float32')
    assert got.accuracy.tolist() == d.accuracy.tolist()

def test_again_and_with_two_processes_the_same(demo, few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, 'digits', few_digits)
    monkeypatch.setattr(cli, '_STUDENTS', ('Natural', 'ADER'))
    monkeypatch.setattr(cli, 'get_context', lambda _: get_context('fork')) # which saves the imports
    torch.rand(7) # a program that did something before
    cli.ader_demo(tmp_path, seed=3, quick=True, workers=2)
    for f in ('student.json', 'student.safetensors'):
        assert (tmp_path/f).read_bytes() == (demo/f).read_bytes(), f
    a, b = (json.loads((o/'record.json').read_text()) for o in (demo, tmp_path))
    assert a | dict(seconds=0) == b | dict(seconds=0)


# From a folder of images to an evaluated student

def stripes(root:Path, freqs:dict, n:int=40, size:int=24) -> Path:
    "Classes that differ in the frequency of stripes, which a smaller image does not show."
    rng, t = np.random.default_rng(0), np.arange(size)/size
    for name,w in freqs.items():
        (root/name).mkdir(parents=True)
        for i in range(n):
            im = 128 + 60*np.sin(2*np.pi*(w*t + rng.random())) + rng.normal(0, 10, (size,size))
            Image.fromarray(im.clip(0, 255).astype(np.uint8)).save(root/name/f'{i}.png')
    return root

@pytest.fixture(scope='module')
def flow(tmp_path_factory):
    "Two teachers and a student of grey 24×24 images, by the commands."
    root = tmp_path_factory.mktemp('flow')
    data = stripes(root/'stripes', dict(coarse=2, middle=5, fine=9))
    few = ['--data', data, '--epochs', 2, '--images', 20, '--bs', 32]
    teacher = [*few, '--net', 'small_resnet:width=4', '--size', 24, '--channels', 1]
    for method,out in (('natural', 'clean'), ('sat', 'robust')):
        assert run('ader_teach', *teacher, '--method', method, '--out', root/out) == 0
    teachers = ['--clean', root/'clean', '--robust', root/'robust']
    student = ['--student', 'small_resnet:width=4', '--out', root/'student']
    assert run('ader_distill', *few, *student, *teachers) == 0
    return root

def test_what_the_commands_write(flow):
    names = lambda k: sorted(o.name for o in (flow/k).iterdir())
    assert names('clean') == ['teacher.json', 'teacher.safetensors']
    assert names('student') == ['report.html', 'student.json', 'student.safetensors']
    m = load(flow/'student'/'student').metadata
    assert m['image'] == [1,24,24] # size and channels from the teachers
    assert m['run_config']['method'] == 'ADER' and m['test']['images'] == 20
    assert load(flow/'robust'/'teacher').metadata['verified']['images'] == 20

def test_given_again(flow, capsys):
    argv = ['--data', flow/'stripes', '--epochs', 2, '--images', 20, '--bs', 32, '--size', 24,
            '--channels', 1, '--net', 'small_resnet:width=4', '--method', 'natural',
            '--out', flow/'clean']
    before = {o: o.read_bytes() for o in (flow/'clean').iterdir()}
    assert run('ader_teach', *argv) == 0 and 'is there already' in capsys.readouterr().out
    assert run('ader_teach', *argv, '--seed', 1) == 2
    assert 'is another teacher (seed 0, not 1)' in capsys.readouterr().err
    assert {o: o.read_bytes() for o in (flow/'clean').iterdir()} == before

def test_a_network_is_evaluated_on_images_as_it_was_trained_on(flow, tmp_path, capsys):
    argv = [flow/'student', '--images', 0, '--out', tmp_path]
    assert run('ader_evaluate', *argv, '--data', flow/'stripes') == 0
    test = load_data(flow/'stripes', size=24, channels=1).test
    want = evaluate(load(flow/'student'/'student'), test, [], progress=False).accuracy[0]
    assert pd.read_csv(tmp_path/'student.csv').accuracy[0] == pytest.approx(want)
    assert (tmp_path/'student.html').is_file()
    other = stripes(tmp_path/'other', dict(a=2, b=5, c=9), n=4)
    assert run('ader_evaluate', *argv, '--data', other) == 2
    says = "has classes ['a', 'b', 'c'], the network needs ['coarse', 'fine', 'middle']"
    assert says in capsys.readouterr().err
    assert run('ader_evaluate', *argv) == 2
    assert 'was trained on stripes; say by --data' in capsys.readouterr().err

def test_attacks_on_request(flow, tmp_path):
    "Transfer, Square for as many queries as were asked for, and AutoAttack."
    argv = [flow/'student', '--data', flow/'stripes', '--images', 4, '--out', tmp_path]
    more = ['--queries', 20, '--autoattack', '--transfer', flow/'robust']
    assert run('ader_evaluate', *argv, *more) == 0
    rows = ['clean', 'FGSM', 'PGD_sat', 'PGD_trades', 'CW_inf', 'AutoAttack', 'PGD_sat from robust',
            'CW_inf from robust', 'Square', 'worst case']
    assert pd.read_csv(tmp_path/'student.csv').attack.tolist() == rows

def test_several_networks_side_by_side(flow, tmp_path, capsys):
    nets = f'{flow/"student"/"student.json"},{flow/"clean"}'
    argv = ['--data', flow/'stripes', '--images', 4, '--eps', 0.3, '--out', tmp_path]
    assert run('ader_evaluate', nets, *argv) == 0
    names = ['student', 'clean']
    files = [o for n in names for o in (n, f'{n}.images')]
    assert sorted(o.stem for o in tmp_path.glob('*.csv')) == sorted(files)
    table = [o for o in capsys.readouterr().out.splitlines() if o.startswith('|')]
    assert [o.strip() for o in table[0].strip('|').split('|')] == ['', *names]
    assert len(table) == 2 + 6

@pytest.mark.parametrize('argv, says', [('', 'Linf, ε = 0.2'), ('--norm 2', 'L2, ε = 0.5')])
def test_each_norm_has_its_usual_radius(argv, says, tmp_path, capsys):
    save(small_resnet(width=4), tmp_path/'net') # without metadata: digits
    few = [tmp_path/'net', '--images', 4, '--out', tmp_path/'out']
    assert run('ader_evaluate', *few, *argv.split()) == 0
    assert says in capsys.readouterr().out

def test_which_images_were_fooled(natural, tmp_path):
    "A row an image, and the images themselves."
    save(natural, tmp_path/'net')
    argv = [tmp_path/'net', '--images', 30, '--save-images', 3, '--out', tmp_path/'out']
    assert run('ader_evaluate', *argv) == 0
    t, table = (pd.read_csv(tmp_path/'out'/f'net.{k}') for k in ('images.csv', 'csv'))
    assert len(t) == 30 and t.clean.mean() == pytest.approx(table.accuracy[0])
    files = sorted((tmp_path/'out'/'net').iterdir())
    assert len(files) == 6 and all(Image.open(f).size == (8, 8) for f in files)
    for f in files[::2]:
        i, c = f.stem.split('-')[:2]
        row = t.iloc[int(i)]
        assert str(row['class']) == c and row.clean == 1 and row.PGD_sat == 0

def test_grey_images_for_a_grey_network(tmp_path):
    "The channels that the network asks for are those of the images."
    stripes(tmp_path/'grey', dict(a=2, b=6), n=8, size=32)
    argv = ['--data', tmp_path/'grey', '--net', 'small_resnet:in_channels=1,width=4', '--epochs', 1]
    assert run('ader_teach', *argv, '--method', 'natural', '--out', tmp_path/'t') == 0
    assert load(tmp_path/'t'/'teacher').metadata['image'] == [1, 32, 32]

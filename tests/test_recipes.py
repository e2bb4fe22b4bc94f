"The main job as its user runs it: a folder, a table, exit codes."
import base64, json, re, subprocess, sys
import pandas as pd, pytest, torch
from ader.attacks import Threat, paper_attacks
from ader.data import AderError, digits
from ader.evaluation import measure
from ader.recipes import ader_demo, ader_demo_cli, check_out
from ader.teachers import load

FILES = ['attention.png', 'curves.png', 'record.json', 'report.html', 'student.json', 'student.safetensors', 'table.csv', 'table.md', 'weights.png']


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp('demo')
    ader_demo(out, seed=3, epochs=1, quick=True)
    return out


def test_the_folder(demo):
    assert sorted(o.name for o in demo.iterdir()) == FILES
    for f in demo.glob('*.png'): assert f.read_bytes()[:4] == b'\x89PNG'


def test_the_same_seed_gives_the_same_table(demo, tmp_path):
    torch.rand(7) # a program that did something before
    ader_demo(tmp_path, seed=3, epochs=1, quick=True)
    for f in ('table.csv', 'table.md', 'student.safetensors'): assert (tmp_path/f).read_bytes() == (demo/f).read_bytes()


def test_several_processes_give_the_same_table(demo, tmp_path):
    ader_demo(tmp_path, seed=3, quick=True, workers=2)
    for f in FILES:
        if f not in ('record.json', 'report.html'): assert (tmp_path/f).read_bytes() == (demo/f).read_bytes(), f # those two have the seconds


def test_the_page_needs_nothing_but_itself(demo):
    page = (demo/'report.html').read_text()
    srcs = re.findall(r'src="([^"]*)"', page)
    assert [base64.b64decode(s.removeprefix('data:image/png;base64,')) for s in srcs] == [(demo/f).read_bytes() for f in ('curves.png', 'attention.png', 'weights.png')]
    assert not re.search(r'href=|<script|url\(', page)
    for row in (demo/'table.md').read_text().splitlines()[2:]:
        for cell in row.strip('| ').split('|'): assert cell.strip() in page


def test_record_and_table_agree(demo):
    r, d = json.loads((demo/'record.json').read_text()), pd.read_csv(demo/'table.csv')
    assert pd.DataFrame(r['results']).equals(d) and r['seed'] == 3 and r['evaluated'] == '200 test images'


def test_the_saved_student_is_the_one_in_the_table(demo):
    d = pd.read_csv(demo/'table.csv').query("network == 'ADER'")
    got = measure(load(demo/'student'), digits().test, paper_attacks(Threat(0.2)), images=200, seed=3, progress=False)
    assert got.accuracy.tolist() == d.accuracy.tolist()


@pytest.mark.parametrize('argv', [['--eps', '0'], ['--eps', 'nan'], ['--eps', '8'], ['--epochs', '0'], ['--seed', '-1'], ['--workers', '-1'], ['--out', '/proc/ader'],
                                  ['--eps', 'much'], ['--nonsense']])
def test_misuse_is_a_sentence_and_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as e: ader_demo_cli(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out and err.strip().splitlines()[-1].startswith('ader_demo: ')


def test_refused_before_anything_is_touched(demo):
    before = {o: o.read_bytes() for o in demo.iterdir()}
    with pytest.raises(AderError): ader_demo(demo, eps=-1)
    assert {o: o.read_bytes() for o in demo.iterdir()} == before


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path/'f').write_text('whole')
    with pytest.raises(AderError, match="can't write to the folder"): check_out(tmp_path/'f')
    assert (tmp_path/'f').read_text() == 'whole'


def test_the_installed_command():
    "In a process of its own: help with units and defaults, and no traceback."
    run = lambda *a: subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from ader.recipes import ader_demo_cli; ader_demo_cli()', *a], capture_output=True, text=True)
    r = run('--help')
    assert r.returncode == 0 and 'units of pixels' in r.stdout and '0.2' in r.stdout
    r = run('--eps', '0')
    assert r.returncode == 2 and r.stderr.strip() == 'ader_demo: ε must be above 0, got 0.0'

"The built wheel is called ader_distill, installs under that name, and has what the commands need."
import re, shutil, subprocess, sys, zipfile
from email import message_from_string
from pathlib import Path
import pytest
pytest.importorskip('setuptools')
from nbdev.config import get_config

TOP = Path(get_config().config_path)

def call(*argv, **kwargs):
    argv = [sys.executable, *map(str, argv)]
    return subprocess.run(argv, capture_output=True, text=True, check=True, **kwargs)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    src, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('dist')
    for f in ('settings.ini', 'setup.py', 'README.md'): shutil.copy(TOP/f, src)
    shutil.copytree(TOP/'ader', src/'ader', ignore=shutil.ignore_patterns('__pycache__'))
    call('-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '-w', out, src)
    return next(out.iterdir())

def test_its_name_and_what_it_asks_for(wheel):
    assert wheel.name == f'ader_distill-{get_config().version}-py3-none-any.whl'
    with zipfile.ZipFile(wheel) as z:
        info = next(o for o in z.namelist() if o.endswith('/METADATA'))
        about = message_from_string(z.read(info).decode())
        data = {f'templates/{o}' for o in ('classify.txt', 'model_card.md', 'page.html')}
        data |= {'paper_tables.csv', 'experiments.json', 'sample_data/cifar10.zip'}
        data |= {f'sample_data/{o}' for k in ('clean', 'robust', 'student') for o in (f'{k}.json', f'{k}.safetensors')}
        assert {f'ader/{o}' for o in data} <= set(z.namelist())
    assert about['Name'] == 'ader-distill'
    extras = {'robustbench', 'onnx', 'hub', 'accelerate', 'ray', 'dev'}
    assert set(about.get_all('Provides-Extra')) == extras
    needs = [o.split(';')[0].strip() for o in about.get_all('Requires-Dist') if 'extra' not in o]
    assert not [o for o in needs if '<' in o or '==' in o] # lower bounds only
    names = {re.match('[a-zA-Z]+', o)[0] for o in needs}
    assert 'jinja' in names and not names & {'nbdev', 'ray', 'onnx'}

def test_it_installs_under_that_name_and_its_commands_are_there(wheel, tmp_path):
    call('-m', 'pip', 'install', '--quiet', '--no-deps', '--target', tmp_path, wheel)
    code = '''
import sys; sys.path.insert(0, sys.argv.pop(1))
came = lambda names: print([o for o in names.split() if o in sys.modules])
import ader.data; came('fastai torchvision sklearn matplotlib PIL fastprogress')
import ader.attacks; came('fastai pyautoattack pandas torchvision')
from importlib.metadata import distribution
d = distribution('ader-distill')
for e in sorted(d.entry_points.select(group='console_scripts')): print(e.name, callable(e.load()))
from ader.samples import sample_net; sample_net('student')
came('ray onnx onnxruntime huggingface_hub accelerate torchvision torch._dynamo')
print(ader.__file__)
'''
    r = call('-W', 'ignore', '-c', code, tmp_path, cwd=tmp_path)
    images, attacks, *commands, all_of_them, file = r.stdout.splitlines()
    assert (images, attacks, all_of_them) == ('[]',)*3 # a module brings along what it needs, no more
    names = 'bench demo distill evaluate export fit reproduce table teach'.split()
    assert commands == [f'ader_{o} True' for o in names]
    assert Path(file).is_relative_to(tmp_path) # not the package of this folder

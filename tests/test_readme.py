"What the README shows must run as it stands."
import re
from pathlib import Path
from nbdev.config import get_config


def test_the_code_of_the_readme_runs():
    code = re.search(r'```py\n(.*?)```', (Path(get_config().config_path)/'README.md').read_text(), re.S)[1]
    scope = {}
    body, last = code.strip().rsplit('\n', 1)
    exec(body, scope)
    d = eval(last, scope)
    assert d.ok and d['clean'] > 0.9 and d['PGD_sat'] > 0.15

"""What the README says a newcomer can type, works."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ring_rl.kernels import CAUSAL, from_layout, reference_attention

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_the_ring_attention_example_is_exact():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.normal(size=(1, 64, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    names = {"q": q, "k": k, "v": v}
    exec(code, names)  # the README is part of this repository
    out = from_layout(names["out"], axis=1, ring_size=8, layout="zigzag")
    np.testing.assert_allclose(out, reference_attention(q, k, v, mask=CAUSAL)[0], atol=1e-5)


def test_the_files_and_make_targets_it_names_exist():
    for name in re.findall(r"(?:python |\]\()((?:experiments|datasets|conf)/\S+?\.(?:py|md|png|yaml))", README):
        assert (REPOSITORY / name).exists(), name
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", README, re.MULTILINE)
    assert {"demo", "test", "check"} <= set(targets)
    for target in targets:
        assert f"\n{target}:" in makefile, target

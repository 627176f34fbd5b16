from dataclasses import fields

import numpy as np

from phi_runtime.generation.config import GenerationConfig, Options
from phi_runtime.generation.sampler import Sampler, Sampling, log_softmax

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(sampling, n=4000):
    sampler = Sampler(sampling)
    return np.bincount([sampler.draw(LOGITS) for _ in range(n)], minlength=4) / n


def test_temperature_zero_takes_the_likeliest():
    assert draws(Sampling(temperature=0), 10)[0] == 1


def test_temperature_one_draws_by_probability():
    assert np.abs(draws(Sampling(temperature=1)) - np.exp(LOGITS)).max() < 0.03


def test_heat_flattens():
    assert draws(Sampling(temperature=5))[3] > 0.12


def test_top_k_and_top_p_cut_the_tail():
    assert np.abs(draws(Sampling(temperature=1, top_k=2))[:2] - [0.625, 0.375]).max() < 0.03
    assert (draws(Sampling(temperature=1, top_k=2))[2:] == 0).all()
    assert np.abs(draws(Sampling(temperature=1, top_p=0.75))[:2] - [0.625, 0.375]).max() < 0.03
    assert draws(Sampling(temperature=1, top_p=0.4))[0] == 1


def test_a_seed_repeats():
    one, other = Sampler(Sampling(1, seed=5)), Sampler(Sampling(1, seed=5))
    assert [one.draw(LOGITS) for _ in range(50)] == [other.draw(LOGITS) for _ in range(50)]


def test_log_softmax_stands_large_logits():
    out = log_softmax(np.array([[1e4, 0.0], [-1e4, -1e4]], np.float32))
    assert np.allclose(out, [[0, -1e4], [np.log(0.5)] * 2])


def test_every_field_of_the_configuration_is_a_keyword():
    assert Options.__annotations__.keys() == {f.name for f in fields(GenerationConfig)}

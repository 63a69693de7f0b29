"""The tables of biases that decoding keeps from token to token: what they cost, what ends them, what is never kept."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref

import pytest
import torch
from bias_cases import CASES as BIASES
from bias_cases import make
from decode_cases import K, Q, right

import posattn
from posattn import KERPLE, TISA, ALiBi, attention_with_kvcache, kept_table


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def counted(monkeypatch, bias):
    made = []
    monkeypatch.setattr(
        type(bias), "values", lambda self, x, f=type(bias).values: made.append(len(x)) or f(self, x)
    )
    return made


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kept_table_is_the_table(name, dtype):
    bias = make(name).to(dtype).eval()
    for length in (1, 7, 300, 256, 257):
        table, zero = kept_table.kept_table(bias, length, dtype)
        right = bias.table(1, length).to(dtype)  # offsets 1 - length to 0
        torch.testing.assert_close(table[:, zero - length + 1 : zero + 1], right, rtol=1e-6, atol=1e-6)
        ahead = bias.values(torch.arange(16)).to(dtype)
        torch.testing.assert_close(table[:, zero : zero + 16], ahead, rtol=1e-6, atol=1e-6)
        assert table.shape[1] == zero + 16


def test_a_table_is_made_once_and_doubled(monkeypatch):
    bias = TISA(2).eval()
    made = counted(monkeypatch, bias)
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1100, 8), torch.randn(1, 2, 1100, 8)
    for length in range(32, 1100, 7):
        posattn.attention(query, key[:, :, :length], value[:, :, :length], bias, is_causal=True)
    assert [count - 15 for count in made] == [256, 512, 1024, 2048]
    made.clear()
    attention_with_kvcache(query, key, value, bias)
    assert not made


def change_in_place(bias):
    bias.amplitudes.mul_(2.0)


def change_parameter(bias):
    bias.amplitudes = torch.nn.Parameter(torch.full_like(bias.amplitudes, 0.7))


def change_dtype(bias):
    bias.double()


def change_data(bias):
    bias.amplitudes.data = torch.full_like(bias.amplitudes, 0.7)


def load(bias):
    bias.load_state_dict(TISA(2).state_dict())


def step(bias, **how):
    with torch.enable_grad():
        bias.table(3, 3).square().sum().backward()
    torch.optim.AdamW(bias.parameters(), lr=0.1, **how).step()


def fused_step(bias):
    count = bias.amplitudes._version
    step(bias, fused=True)
    assert bias.amplitudes._version == count  # which is why steps are counted


def compiled_step(bias):
    """In a graph of torch.compile, which need not tell of its writes either."""
    with torch.enable_grad():
        bias.table(3, 3).square().sum().backward()
    optimizer = torch.optim.AdamW(bias.parameters(), lr=0.1, fused=True)
    with torch.enable_grad():
        torch.compile(lambda: optimizer.step(), backend="eager")()


def there_and_back(bias):
    bias.train()
    bias.amplitudes.data.mul_(2.0)
    bias.eval()


def told(bias):
    bias.amplitudes.data.mul_(2.0)
    kept_table.forget(bias)


CHANGES = [
    change_in_place, change_parameter, change_dtype, change_data, load, step, fused_step, compiled_step, there_and_back,
    told,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_a_new_table(change):
    bias = TISA(2).eval()
    before, _ = kept_table.kept_table(bias, 10, torch.float32)
    assert kept_table.kept_table(bias, 10, torch.float32)[0] is before
    change(bias)
    after, zero = kept_table.kept_table(bias, 10, torch.float32)
    assert after is not before
    torch.testing.assert_close(after[:, zero - 9 : zero + 1], bias.table(1, 10).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("begins", ["prompt", "training"])
def test_a_sequence_that_begins_makes_it_again(begins):
    """So that what is written past the counts of changes shows at the next prompt, and after any step of training."""
    bias = TISA(2).eval()
    before = right(bias)
    bias.amplitudes.data.mul_(-3.0)
    torch.testing.assert_close(posattn.attention(Q, K, K, bias), before)
    if begins == "prompt":
        posattn.attention(K, K, K, bias)
    else:
        with torch.enable_grad():
            posattn.attention(K[:, :, :20], K, K, bias)
    assert not torch.allclose(right(bias), before)


@pytest.mark.parametrize("name", ["kind", "symmetric"])
def test_settings_that_change(name):
    bias = (KERPLE(2) if name == "kind" else ALiBi(2)).eval()
    before = right(bias, query_start=20)
    setattr(bias, name, "power" if name == "kind" else False)
    assert not torch.allclose(right(bias, query_start=20), before)


def test_far_away():
    """A few keys at a great distance take a few numbers."""
    bias = KERPLE(2).eval()
    right(bias, query_start=2**22)
    assert bias not in kept_table._kept
    right(bias, query_start=300)
    assert kept_table._kept[bias][torch.float32].table.shape == (2, 512 + 15)


class Stream:
    def __init__(self, number):
        self.cuda_stream, self.said = number, []

    def wait_event(self, event):
        self.said.append(event)


def test_another_stream_waits(monkeypatch):
    """As far as a CPU shows it."""
    made_on, other = Stream(1), Stream(2)
    table = types.SimpleNamespace(device="cuda:0", record_stream=other.said.append)
    kept = kept_table._Kept([], (), table, 256, 0, (1, "event"))
    for stream in (made_on, other):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        kept_table._wait(kept)
    assert made_on.said == [] and other.said == ["event", other]


def test_writing_into_a_kept_table_is_noticed():
    bias = TISA(2).eval()
    before, zero = kept_table.kept_table(bias, 10, torch.float32)
    before.fill_(3.0)
    after, zero = kept_table.kept_table(bias, 10, torch.float32)
    torch.testing.assert_close(after[:, zero : zero + 1], bias.values(torch.zeros(1, dtype=torch.long)))


def test_copies_know_nothing_of_it_and_it_goes_with_the_bias():
    bias = TISA(2).eval()
    plain = pickle.dumps(bias)
    table, _ = kept_table.kept_table(bias, 5000, torch.float32)
    assert pickle.dumps(bias) == plain
    twin = copy.deepcopy(bias)
    assert kept_table.kept_table(twin, 10, torch.float32)[0] is not table
    gone = weakref.ref(table)
    del bias, table
    gc.collect()
    assert gone() is None


def test_functional_calls():
    bias = TISA(2).eval()
    kept_table.kept_table(bias, 10, torch.float32)
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    other = {name: torch.rand_like(p) for name, p in bias.named_parameters()}

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = bias

        def forward(self):
            return posattn.attention(query, key, value, self.bias, is_causal=True)

    with torch.enable_grad():
        expected = Call()().detach()
    right = torch.func.functional_call(Call(), {f"bias.{name}": p for name, p in other.items()})
    torch.testing.assert_close(Call()(), expected)
    assert not torch.allclose(right, expected)
    bias.load_state_dict(other)
    torch.testing.assert_close(Call()(), right)


# ------------------------------------------------------------------------------------------- on a GPU


def cache_on_the_gpu(length):
    query = torch.randn(2, 4, 1, 64, device="cuda", dtype=torch.float16)
    key, value = torch.randn(2, 2, 4, length, 64, device="cuda", dtype=torch.float16).unbind()
    return query, key, value


@pytest.mark.gpu
def test_a_table_that_a_graph_reads_stays():
    bias = make("tisa", 4).cuda().eval()
    query, key, value = cache_on_the_gpu(200)
    call = dict(backend="triton")
    attention_with_kvcache(query, key, value, bias, **call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_with_kvcache(query, key, value, bias, **call)
    expected = attention_with_kvcache(query, key, value, bias, **call)
    kept_table.kept_table(bias, 100_000, torch.float32)  # a longer one takes its place
    filler = [torch.full((4, 271), float("nan"), device="cuda") for _ in range(50)]
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert filler


@pytest.mark.gpu
def test_a_table_of_another_stream():
    """Read where it is being made, and freed, while the other stream reads."""
    query, key, value = cache_on_the_gpu(200)
    expected = attention_with_kvcache(query, key, value, make("tisa", 4).cuda(), backend="triton")
    bias, other = make("tisa", 4).cuda().eval(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(50_000_000)
        attention_with_kvcache(query, key, value, bias, backend="triton")
    out = attention_with_kvcache(query, key, value, bias, backend="triton")
    torch.cuda.synchronize()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)

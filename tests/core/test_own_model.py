"""Laws of one's own models: what is prunable, what stays, what is refused, and that runs are functions of the seed."""

import copy

import pytest
import torch
from conftest import interrupted, same_history, tiny_config
from torch import nn
from torch.nn import functional as F

from feddip_lite import load_model, run
from feddip_lite.core.errors import Note
from feddip_lite.core.flat import FlatModel, Layout, uses_per_sample
from feddip_lite.core.models import build_model, stock
from feddip_lite.core.own_model import OwnModel, check_model, fingerprint, own_model, register_model, source_of
from feddip_lite.data.datasets import normalise
from feddip_lite.methods import METHODS
from feddip_lite.methods.fedavg import FedAvg
from feddip_lite.records.store import read_run
from feddip_lite.studies.cost.measure import sparse_model
from feddip_lite.train.observe import LastState

RUN = {"clients": 6, "clients_per_round": 3, "rounds": 2, "mask_interval": 1, "batch_size": 64, "width": 1.0}


pytestmark = pytest.mark.usefixtures("forgetting")


class Everything(nn.Module):
    """A module with every kind of layer that is prunable, and some that are not."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.one, self.two, self.three = nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 3)
        self.up, self.linear, self.both = nn.ConvTranspose2d(2, 3, 3), nn.Linear(4, 5), nn.Bilinear(2, 3, 4)
        self.lstm, self.gru = nn.LSTM(4, 6, bidirectional=True), nn.GRU(4, 6)
        self.attention = nn.MultiheadAttention(4, 2)
        self.position = nn.Parameter(torch.zeros(3, 4))


def test_weights_of_all_convolutions_linear_recurrent_and_attention_layers_are_prunable_and_nothing_else():
    names = {slot.name for slot in Layout.of(Everything()).prunable_slots}
    directions = ("", "_reverse")
    expected = {f"{name}.weight" for name in ("one", "two", "three", "up", "linear", "both", "attention.out_proj")}
    expected |= {f"lstm.weight_{kind}_l0{way}" for kind in ("ih", "hh") for way in directions}
    expected |= {"gru.weight_ih_l0", "gru.weight_hh_l0", "attention.in_proj_weight"}
    assert names == expected


@pytest.mark.parametrize(("spared", "kept"), [("none", 4), ("first", 3), ("last", 3), ("both", 2)])
def test_first_and_last_layers_stay_dense_if_asked_for(spared, kept):
    module = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2))
    found = {slot.name.split(".")[0] for slot in Layout.of(module, dense_layers=spared).prunable_slots}
    layers = ["0", "1", "3", "4"]
    first, last = spared in ("first", "both"), spared in ("last", "both")
    assert found == set(layers[first : len(layers) - last]) and len(found) == kept
    assert Layout.of(module, dense_layers=spared).size == Layout.of(module).size
    config = tiny_config(**{**RUN, "target_sparsity": 0.8, "final_prune": True, "dense_layers": spared})
    last_state = LastState()
    run(config, model=tied, progress=False, observers=[last_state])
    layout = Layout.of(tied(), dense_layers=spared)
    assert len(last_state.state.mask) == layout.prunable


def test_weights_know_how_often_they_are_used():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up = nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 3, 2)
            self.lstm, self.head = nn.LSTM(15, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            steps = self.up(self.conv(x)).flatten(2)[:, :, :15]  # (b, 3, 15): three steps
            return self.head(self.lstm(steps)[0][:, -1])

    uses = uses_per_sample(Net(), (1, 6, 6))
    assert uses == {
        "conv.weight": 16, "up.weight": 16, "lstm.weight_ih_l0": 3, "lstm.weight_hh_l0": 3, "head.weight": 1,
    }  # fmt: skip


def tied() -> nn.Sequential:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 10)
    )
    model[4].weight = model[3].weight
    return model


def test_a_shared_tensor_is_one_and_stays_one():
    layout = Layout.of(tied())
    assert [slot.name for slot in layout.prunable_slots] == ["1.weight", "3.weight", "5.weight"]
    model = FlatModel(tied(), layout)
    model.weights.add_(1.0)
    assert torch.equal(model.module[3].weight, model.module[4].weight)
    last = LastState()
    run(tiny_config(**RUN), model=tied, progress=False, observers=[last])
    assert len(last.state.weights) == layout.size


def test_frozen_parameters_have_no_place_and_stay_to_the_bit():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(784, 20), nn.Linear(20, 10)
            self.first.requires_grad_(False)

        def forward(self, x):
            return self.last(F.relu(self.first(x.flatten(1))))

    assert [slot.name for slot in Layout.of(Half()).slots] == ["last.weight", "last.bias"]
    model, workers = Half(), []
    frozen = copy.deepcopy(model.first.state_dict())

    class Look(LastState):
        def ended(self, run, error):
            workers.extend(run.clients.workers._threads)

    run(tiny_config(**RUN), model=model, progress=False, observers=[Look()])
    for each in (model, *(worker.module for worker in workers)):
        assert all(torch.equal(frozen[name], tensor) for name, tensor in each.first.state_dict().items())


class Random(nn.Module):
    """Draws in every way that PyTorch has."""

    def __init__(self):
        super().__init__()
        self.conv, self.dropout, self.rrelu = nn.Conv2d(1, 4, 5, stride=3), nn.Dropout(0.3), nn.RReLU()
        self.last = nn.Linear(4 * 64, 10)

    def forward(self, x):
        x = F.dropout(self.rrelu(self.conv(x)).flatten(1), 0.2, self.training)
        return self.last(self.dropout(x) + 0.1 * torch.randn(1))


def test_random_layers_draw_the_same_for_any_number_of_workers_and_the_global_generator_stays_as_it_was():
    before = torch.random.get_rng_state()
    histories = [run(tiny_config(workers=workers, **RUN), model=Random, progress=False) for workers in (1, 2, "auto")]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(5)
    histories.append(run(tiny_config(workers=2, **RUN), model=Random, progress=False))
    assert all(same_history(histories[0], other) for other in histories[1:])
    other = run(tiny_config(workers=1, seed=1, **RUN), model=Random, progress=False)
    assert other["loss"].tolist() != histories[0]["loss"].tolist()


def test_a_model_that_draws_is_recognised_and_left_alone():
    module, plain = Random(), tied()
    weights, before = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    assert check_model("mine", module, Layout.of(module), (1, 28, 28), 10)
    assert not check_model("mine", plain, Layout.of(plain), (1, 28, 28), 10)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())


def normed():
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(784, 10)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nn.Linear(3, 10), "cannot take images (2, 1, 28, 28) (RuntimeError: "),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 7)),
            "its output for 2 images is (2, 7); expected logits (2, 10)",
        ),
        (lambda: nn.LSTM(28, 10), "cannot take images"),
        (lambda: nn.Flatten(), "no prunable weights; expected a convolution"),
        (normed, "1.parametrizations.weight.original0 is parametrised; expected plain weights"),
        (lambda depth: nn.Flatten(), "<lambda> needs depth; expected a model made from classes, width"),
        (lambda: 3, "gives a int; expected an nn.Module"),
        ("resnet", "a str; expected an nn.Module"),
    ],
)
def test_a_model_that_cannot_work_is_one_line(make, said):
    with pytest.raises(ValueError) as caught:
        run(tiny_config(**RUN), model=make, progress=False)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_factory_is_given_what_it_asks_for_and_a_module_keeps_its_weights():
    asked = {}

    def make(channels, classes=3):
        asked.update(channels=channels, classes=classes)
        return nn.Linear(2, 2)

    register_model("mine", make)
    build_model("mine", classes=7, channels=3, size=9)
    assert asked == {"channels": 3, "classes": 7}
    one, two, other = (build_model("mine", classes=7, channels=3, size=9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.weight, two.weight) and not torch.equal(one.weight, other.weight)
    module = nn.Linear(2, 2)
    register_model("given", module)
    copied = build_model("given", classes=7, channels=3, size=9)
    assert torch.equal(copied.weight, module.weight) and copied.weight is not module.weight
    with pytest.raises(ValueError, match="is one of the paper's"):
        register_model("lenet5", make)
    assert own_model("lenet5") is None and own_model("nowhere") is None
    assert isinstance(own_model("mine"), OwnModel)


def test_width_of_a_model_without_one_is_refused():
    with pytest.raises(ValueError, match="width: 0.5 is not valid; expected 1"):
        run(tiny_config(**{**RUN, "width": 0.5}), model=tied, progress=False)


def test_fingerprint_tells_structure_source_freezing_and_given_weights_apart_and_nothing_else():
    def one():
        return nn.Linear(3, 2)

    def frozen():
        return nn.Linear(3, 2).requires_grad_(False)

    given = nn.Linear(3, 2)
    same = copy.deepcopy(given)
    prints = [
        fingerprint(one, one()),
        fingerprint(frozen, frozen()),
        fingerprint(given, given),
        fingerprint(one, nn.Linear(3, 4)),
    ]
    assert len({*prints}) == 4
    assert fingerprint(one, one()) == prints[0]  # other weights, drawn anew
    assert fingerprint(same, same) == prints[2]
    with torch.no_grad():
        same.weight[0, 0] += 1
    assert fingerprint(same, same) != prints[2]


def test_fingerprint_tells_layers_without_weights_and_their_settings_apart():
    linear = nn.Linear(3, 3)
    between = (nn.ReLU(), nn.Tanh(), nn.Dropout(0.3), nn.Dropout(0.5))
    modules = [nn.Sequential(copy.deepcopy(linear), layer) for layer in between]
    assert len({fingerprint(module, module) for module in modules}) == len(modules)

    def maker(rate):
        return lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(rate))

    makers = maker(0.3), maker(0.5)  # one source, another closure
    assert len({fingerprint(make, make()) for make in makers}) == 2


def test_kept_dense_names_whole_modules():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
    module.kept_dense = ("1",)
    dense = {slot.name for slot in Layout.of(module).slots} - {slot.name for slot in Layout.of(module).prunable_slots}
    assert {name for name in dense if name.endswith("weight")} == {"1.weight"}


def test_source_tells_methods_values_and_own_bases_of_a_class_apart():
    def make(strength, text):
        class Base:
            def step(self):
                return 1

        if text:

            class Base:
                def step(self):
                    return 2

        class Mine(Base, nn.Module):
            rate = strength

        return Mine

    sources = [source_of(make(strength, text)) for strength in (0.1, 0.2) for text in (True, False)]
    assert len({*sources}) == 4
    assert source_of(make(0.1, True)) == sources[0]
    assert source_of(eval("lambda x: x + 1")) != source_of(eval("lambda x: x + x"))


def test_stock_layers_compute_what_ours_do():
    ours = build_model("alexnet", classes=10, width=0.1, channels=3, size=32).eval()
    images = torch.rand(3, 3, 32, 32)
    plain = stock(copy.deepcopy(ours))
    assert {type(layer) for layer in plain.modules()} <= {type(plain), nn.Conv2d, nn.Linear, nn.Dropout}
    assert plain.state_dict().keys() == ours.state_dict().keys()
    torch.testing.assert_close(plain(images), ours(images))


def test_a_recurrent_model_is_as_sparse_as_it_says(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(28, 32, batch_first=True), nn.Linear(32, 10)

        def forward(self, x):
            return self.head(self.lstm(x.squeeze(1))[0][:, -1])

    config = tiny_config(method="fedmap", target_sparsity=0.9, final_prune=True, **RUN)
    history = run(config, model=Reader, results_dir=tmp_path, progress=False)
    module = load_model(tmp_path, history.attrs["run_id"], Reader)
    weights = [p for p in module.parameters() if p.dim() > 1]
    zeros, count = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
    assert zeros == round(0.9 * count) and history["sparsity"].iloc[-1] == zeros / count
    (_, record) = read_run(tmp_path, history.attrs["run_id"])
    total = sum(p.numel() for p in module.parameters())
    assert record["provenance"]["weights"] == {"all": total, "prunable": count}


def test_a_note_says_if_little_of_a_model_can_be_pruned():
    class Wordy(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(300, 20), nn.Linear(20, 10)

        def forward(self, x):
            return self.head(self.words(x.flatten(1)[:, :5].long()).mean(1))

    with pytest.warns(Note, match="3.2 % of its 6210 weights are prunable; a sparsity is one of these alone"):
        run(tiny_config(**RUN), model=Wordy, progress=False)


@pytest.mark.parametrize("batch_size", [15, 16])
def test_a_last_batch_of_one_that_batchnorm_cannot_take_is_refused_before_anything_is_trained(batch_size):
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    images, labels = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 4
    data = images[:32], labels[:32], images[32:], labels[32:]
    config = tiny_config(**{**RUN, "clients": 2, "clients_per_round": 2, "batch_size": batch_size})
    if batch_size == 16:
        assert len(run(config, model=make, data=data, progress=False)) == 2
        return
    with pytest.raises(
        ValueError, match="batch_size: 15 leaves client 0, who has 16 training samples, a last batch of"
    ):
        run(config, model=make, data=data, progress=False)


def first(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), nn.Linear(8, classes))


def second(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Tanh(), nn.Linear(8, classes))


def test_another_model_behind_a_name_is_refused_by_run_and_resume(tmp_path):
    register_model("mine", first)
    config = tiny_config(**{**RUN, "rounds": 3}, model="mine")
    interrupted(config, tmp_path, stops=1)
    register_model("mine", second)
    with pytest.raises(ValueError, match="a run with another model of this name .*; delete it to start the run again"):
        run(config, results_dir=tmp_path, progress=False)
    register_model("mine", first)
    whole = run(config, results_dir=tmp_path, progress=False)
    assert same_history(whole, run(config, progress=False))
    register_model("mine", second)
    with pytest.raises(ValueError, match="recorded with another model of this name .*; use another results folder"):
        run(config, results_dir=tmp_path, progress=False)


def test_another_method_behind_a_name_is_refused(tmp_path, monkeypatch):
    class Mine(FedAvg):
        pass

    monkeypatch.setitem(METHODS, "mine", Mine)
    config = tiny_config(**{**RUN, "mask_interval": None}, method="mine")
    run(config, results_dir=tmp_path, progress=False)
    run(config, results_dir=tmp_path, progress=False)

    class Mine(FedAvg):
        def penalty(self, t):
            return 1.0

    monkeypatch.setitem(METHODS, "mine", Mine)
    with pytest.raises(ValueError, match="recorded with another method of this name"):
        run(config, results_dir=tmp_path, progress=False)


def test_what_is_handed_out_adds_gradients_up(federation):
    state, clients, _ = federation(tiny_config())
    data, config = clients.data, tiny_config()
    images, labels = normalise(data.train_images[:32], data), data.train_labels[:32]
    gradients = []
    for pieces in (1, 2):
        module = sparse_model(state, data, config)
        for x, y in zip(images.chunk(pieces), labels.chunk(pieces), strict=True):
            (F.cross_entropy(module(x), y) / pieces).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    torch.testing.assert_close(*gradients)

"""Which replica a request goes to."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from rayfin.serving.routing import RecentAdapters, ReplicaState, rank

LOADING, CAPACITY = 4.0, 40


def first(places: list[ReplicaState], adapter: str | None = "support@3") -> str:
    return rank(places, adapter, loading=LOADING, capacity=CAPACITY)[0].name


def test_a_request_goes_where_its_adapter_is() -> None:
    assert first([ReplicaState("a", 0, False), ReplicaState("b", 3, True)]) == "b"


def test_it_goes_elsewhere_when_that_replica_is_busy() -> None:
    assert first([ReplicaState("a", 0, False), ReplicaState("b", 5, True)]) == "a"


def test_a_full_replica_comes_last_even_if_it_has_the_adapter() -> None:
    assert first([ReplicaState("a", CAPACITY - 1, False), ReplicaState("b", CAPACITY, True)]) == "a"


def test_of_those_that_hold_it_the_least_busy_answers() -> None:
    assert (
        first([ReplicaState("a", 2, True), ReplicaState("b", 1, True), ReplicaState("c", 0, False)])
        == "b"
    )


def test_the_base_model_is_everywhere() -> None:
    assert first([ReplicaState("a", 1, False), ReplicaState("b", 0, False)], adapter=None) == "b"


def test_a_hot_adapter_comes_to_use_all_replicas() -> None:
    loads, recent = Counter({"a": 0, "b": 0, "c": 0}), RecentAdapters(slots=2)
    for _ in range(60):
        places = [
            ReplicaState(name, load, recent.has(name, "hot@1")) for name, load in loads.items()
        ]
        chosen = first(places, "hot@1")
        loads[chosen] += 1
        recent.note(chosen, "hot@1")
    assert max(loads.values()) - min(loads.values()) <= 1


def test_adapters_that_are_nowhere_spread_over_the_replicas_and_each_keeps_its_place() -> None:
    idle = [ReplicaState("a", 0, False), ReplicaState("b", 0, False)]
    homes = {f"adapter-{i}@1": first(idle, f"adapter-{i}@1") for i in range(100)}
    assert min(Counter(homes.values()).values()) > 25
    assert all(first(idle[::-1], adapter) == home for adapter, home in homes.items())


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=8))
def test_no_replica_is_chosen_that_is_much_busier_than_another(
    replicas: list[tuple[int, bool]],
) -> None:
    places = [ReplicaState(str(i), load, holds) for i, (load, holds) in enumerate(replicas)]
    ranked = rank(places, "support@3", loading=LOADING, capacity=CAPACITY)
    assert sorted(ranked, key=str) == sorted(places, key=str)
    assert ranked[0].load <= min(place.load for place in places) + LOADING


def test_what_was_asked_for_long_ago_is_forgotten() -> None:
    recent = RecentAdapters(slots=2)
    for adapter in ("one@1", "two@1", "one@1", "three@1"):
        recent.note("a", adapter)
    held = [name for name in ("one@1", "two@1", "three@1") if recent.has("a", name)]
    assert held == ["one@1", "three@1"]
    assert not recent.has("b", "one@1")
    recent.keep(["b"])
    assert not recent.has("a", "one@1")

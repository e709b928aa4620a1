import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipvla.rollout.sim_pool import AffinityQueue

jobs = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 99)), max_size=30, unique=True)


@given(jobs, st.lists(st.sampled_from(["a", "b", "c", "z", None]), min_size=30, max_size=30))
def test_every_job_leaves_once_and_groups_keep_their_order(jobs, known):
    queue = AffinityQueue(jobs, group=lambda job: job[0])
    taken = [queue.take(known[i]) for i in range(len(jobs))]
    assert not queue
    assert [sorted(taken), *([j for j in taken if j[0] == g] for g in "abc")] == [
        sorted(jobs),
        *([j for j in jobs if j[0] == g] for g in "abc"),
    ]


def test_a_worker_keeps_its_group_and_then_helps_where_most_waits():
    queue = AffinityQueue(["a1", "b1", "b2", "b3", "c1"], group=lambda job: job[0])
    assert [queue.take("a"), queue.take("a"), queue.take("c")] == ["a1", "b1", "c1"]


def test_what_is_put_back_comes_next_in_its_group():
    queue = AffinityQueue(["a1", "a2"], group=lambda job: job[0])
    queue.put_back(queue.take("a"))
    assert queue.take("a") == "a1"


def test_an_empty_queue_says_so():
    with pytest.raises(IndexError):
        AffinityQueue([], group=str).take(None)

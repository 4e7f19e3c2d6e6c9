"""Blocks: held, shared, idle, evicted; and any order of calls leaves the books right."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from rorqual.engine.blocks import BlockPool, block_hash, root_hash


def test_a_published_block_is_found_until_it_is_the_oldest_and_room_is_needed() -> None:
    pool = BlockPool(2)
    a, b = pool.allocate(), pool.allocate()
    assert a is not None
    assert b is not None
    names = [block_hash(root_hash(""), [i]) for i in range(2)]
    pool.publish(a, names[0])
    pool.publish(b, names[1])
    pool.release(a)
    pool.release(b)
    assert pool.find(names[0]) == a
    pool.release(a)
    assert pool.allocate() == b  # the least recently used
    assert pool.find(names[1]) is None
    assert pool.find(names[0]) == a
    assert pool.allocate() is None


def test_names_depend_on_everything_before_and_on_the_salt() -> None:
    assert block_hash(root_hash(""), [1, 23]) != block_hash(root_hash(""), [12, 3])
    assert block_hash(root_hash("a"), [1]) != block_hash(root_hash("b"), [1])
    assert block_hash(block_hash(root_hash(""), [1]), [2]) != block_hash(block_hash(root_hash(""), [3]), [2])


def test_shared_blocks_live_until_the_last_holder_lets_go() -> None:
    pool = BlockPool(1)
    block = pool.allocate()
    assert block is not None
    pool.publish(block, b"n")
    assert pool.find(b"n") == block
    pool.release(block)
    assert pool.allocate() is None
    pool.release(block)
    assert pool.allocate() == block


class Books(RuleBasedStateMachine):
    """Random allocate, find, publish, release and forget."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5)

    @rule(target=held)
    def allocate(self) -> int | None:
        return self.pool.allocate()

    @rule(target=held, name=st.integers(0, 6))
    def find(self, name: int) -> int | None:
        return self.pool.find(b"%d" % name)

    @rule(block=held, name=st.integers(0, 6))
    def publish(self, block: int | None, name: int) -> None:
        if block is not None and self.pool._count[block]:
            self.pool.publish(block, b"%d" % name)

    @rule(block=consumes(held))
    def release(self, block: int | None) -> None:
        if block is not None and self.pool._count[block]:
            self.pool.release(block)

    @rule()
    def forget(self) -> None:
        self.pool.forget_all()

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check()


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, deadline=None)

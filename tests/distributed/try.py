import sys
from tests.distributed.pool import RankPool
from tests.distributed import checks
if __name__ == "__main__":
    for f, *a in [(checks.with_a_failing_compiler, "wan", "lazily"),  (checks.videos, "cogvideox", checks.IDENTITY, "tensor parallel"), (checks.videos, "wan", {**checks.IDENTITY, "strict": False}, "fully sharded"),(checks.videos, "wan", {**checks.IDENTITY, "strict": False}, "ring"), (checks.videos, "wan", {**checks.IDENTITY, "strict": False}, "anything"),]:
        if sys.argv[1:] and not any(x in str((f.__name__,a)) for x in sys.argv[1:]): continue
        with RankPool(2) as p:
            try: print(f.__name__, a, p.run(f, *a), flush=True)
            except AssertionError as e: print(f.__name__, a, "FAILED", str(e)[-2500:], flush=True)

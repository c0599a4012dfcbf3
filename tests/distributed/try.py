import sys
from tests.distributed.pool import RankPool
from tests.distributed import checks
from tests.support import IDENTITY, SELECTION
if __name__ == "__main__":
    n=int(sys.argv[1])
    with RankPool(n) as p:
        for name in sys.argv[2:]:
            print(name, p.run(checks.diffusers_alone, name), flush=True)
            for reg in (False, True):
              for o in (IDENTITY, SELECTION):
                for d in p.run(checks.difference, name, o, reg)[:1]:
                    print(name, reg, {k: v for k,v in d.items() if k!="runs"}, len(d["runs"]), flush=True)

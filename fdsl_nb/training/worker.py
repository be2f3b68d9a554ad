"""What `launch` starts: the launcher of the ranks (given PROCESSES FOLDER), then each rank (given FOLDER)."""

import sys
from fdsl_nb.core.processes import leave_with_parent


def main():
    leave_with_parent()  # before the imports below, which take seconds
    if len(sys.argv) == 2:
        from fdsl_nb.training.distributed import run_as_rank

        return run_as_rank(sys.argv[1])
    from torch.distributed.run import main as start_ranks

    start_ranks(
        [
            '--standalone',
            '--nproc-per-node',
            sys.argv[1],
            '-m',
            'fdsl_nb.training.worker',
            sys.argv[2],
        ]
    )


if __name__ == '__main__':
    main()

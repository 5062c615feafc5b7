"""The main command: ``python train.py recipe=resnet_w4a8``; ``--help`` lists groups and keys."""

from qat.cli import main

if __name__ == "__main__":
    main()

"""Tests on emulated hosts: real sshd, pdsh and SLURM on one machine."""

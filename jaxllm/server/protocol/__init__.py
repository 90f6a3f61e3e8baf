"""What requests may say, as pydantic models; those of sampling are made from the table in `serving/sampling_params.py`."""

# fastattn with its CUDA kernels: docker build -t fastattn .
# FASTATTN_CUDA_ARCHS: the GPUs that the kernels are built for; 90a is Hopper, 80 covers Ampere and Ada.
ARG CUDA=13.0.2

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/fastattn
ENV PATH=/opt/fastattn/bin:$PATH PIP_NO_CACHE_DIR=1
# torch is gigabytes: a layer that only its own pin changes.
COPY requirements /requirements
RUN pip install -r /requirements/torch.txt -r /requirements/build.txt
COPY . /src
ARG FASTATTN_CUDA_ARCHS="90a;80"
# In the environment that has torch already: the build takes its headers from there.
RUN FASTATTN_CUDA=on FASTATTN_CUDA_ARCHS="${FASTATTN_CUDA_ARCHS}" pip install --no-build-isolation "/src[server]"

FROM nvidia/cuda:${CUDA}-base-ubuntu24.04
# The same python3 as in the first stage: the environment's is a link to it.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home fastattn
COPY --from=build /opt/fastattn /opt/fastattn
ENV PATH=/opt/fastattn/bin:$PATH
USER fastattn
WORKDIR /home/fastattn
EXPOSE 8000
# For `serve` on its own port, without TLS; --no-healthcheck for anything else.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fastattn"]
CMD ["--help"]

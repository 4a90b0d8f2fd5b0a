{{/* The pods of one model's groups. */}}
{{- define "quire.workerGroup" -}}
{{- $root := .root -}}
{{- $workers := .model.workers -}}
{{- $isCuda := eq .model.config.device "cuda" -}}
{{- $replicas := include "quire.workerReplicas" .model -}}
- groupName: {{ include "quire.workerGroupName" .model }}
  replicas: {{ $replicas }}
  minReplicas: {{ $replicas }}
  maxReplicas: {{ $replicas }}
  # Pods of one replica come and go together: they hold one copy of the model.
  numOfHosts: {{ include "quire.hostsPerGroup" .model }}
  rayStartParams:
    # A rank takes one of Ray's CPUs and, on cuda, one of its GPUs.
    num-cpus: {{ int64 $workers.ranksPerHost | quote }}
    num-gpus: {{ ternary (int64 $workers.ranksPerHost) 0 $isCuda | quote }}
    {{- include "quire.rayStartParams" $root | nindent 4 }}
  template:
    metadata:
      labels:
        {{- include "quire.selectorLabels" $root | nindent 8 }}
        app.kubernetes.io/component: worker
      {{- with $workers.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "quire.serviceAccountName" $root }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ include "quire.rayGracePeriodSeconds" $root }}
      securityContext:
        {{- include "quire.podSecurityContext" $root | nindent 8 }}
      {{- with $root.Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- include "quire.placement" $workers | nindent 6 }}
      topologySpreadConstraints:
        {{- if $workers.topologySpreadConstraints }}
        {{- toYaml $workers.topologySpreadConstraints | nindent 8 }}
        {{- else }}
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "quire.workerLabels" (dict "root" $root "model" .model) | nindent 14 }}
        {{- end }}
      {{- with include "quire.fetchModel" $root }}
      initContainers:
        {{- . | nindent 8 }}
      {{- end }}
      containers:
        - name: ray-worker
          image: {{ include "quire.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          env:
            {{- include "quire.commonEnv" $root | nindent 12 }}
            {{- include "quire.hubEnv" $root | nindent 12 }}
            {{- include "quire.rayEnv" $root | nindent 12 }}
            {{- include "quire.rayContainerTokenEnv" $root | nindent 12 }}
            {{- with $workers.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: metrics, containerPort: 8080}
          resources:
            {{- include "quire.rankResources" (dict "model" .model "ranks" $workers.ranksPerHost) | nindent 12 }}
          securityContext:
            {{- include "quire.containerSecurityContext" $root | nindent 12 }}
          volumeMounts:
            - name: scratch
              mountPath: /tmp
            - name: shm
              mountPath: /dev/shm
            {{- include "quire.modelMounts" $root | nindent 12 }}
      volumes:
        - name: scratch
          emptyDir:
            sizeLimit: {{ $workers.scratchSize }}
        - name: shm
          emptyDir:
            medium: Memory
            sizeLimit: {{ $workers.shmSize }}
        {{- include "quire.modelVolumes" $root | nindent 8 }}
{{- end -}}

{{/* The labels that KubeRay puts on these pods. */}}
{{- define "quire.workerLabels" -}}
ray.io/cluster: {{ include "quire.fullname" .root }}
ray.io/group: {{ include "quire.workerGroupName" .model }}
{{- end -}}
